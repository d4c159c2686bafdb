"""Folders in object stores: `gs://bucket/…` and `s3://bucket/…`.

Files are accessed through `etils.epath` and fsspec (gcsfs, s3fs), arrays
through TensorStore. Stores have no folders and cannot rename files, but writing
a file is atomic.
"""

from collections.abc import Iterator
import contextlib
import os
import pathlib
import shutil
import tempfile
from typing import Any, NamedTuple
import uuid
import weakref

from etils import epath
import fsspec

from dst_t5x.core import errors

# Scheme -> the library that fsspec needs, and the command that installs it.
_LIBRARIES = {
  'gs': ('gcsfs', 'pip install gcsfs'),
  's3': ('s3fs', "pip install 'dst_t5x[s3]'"),
}
# By default, gcsfs asks Google for credentials and the bucket's kind each time.
os.environ.setdefault('GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT', 'false')
# With a cache, a process does not see what another one has written since.
for _scheme in _LIBRARIES:
  fsspec.config.conf.setdefault(_scheme, {}).setdefault(
    'use_listings_cache', False
  )
_CREDENTIALS = {
  'gs': '`gcloud auth application-default login`, or'
  ' GOOGLE_APPLICATION_CREDENTIALS',
  's3': '`aws configure`, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY',
}


def is_remote(path: str | os.PathLike[str]) -> bool:
  """Returns whether a path is in an object store of any kind."""
  return '://' in os.fspath(path)


def scheme(path: str | os.PathLike[str]) -> str:
  """Returns the part before `://`; '' for a local path."""
  before, separator, _ = os.fspath(path).partition('://')
  return before if separator else ''


def split(path: str | os.PathLike[str]) -> tuple[str, str]:
  """Returns the bucket and the key of a path in an object store."""
  bucket, _, key = os.fspath(path).partition('://')[2].partition('/')
  return bucket, key


def stated_path(
  path: Any, file: str | os.PathLike[str], what: str, remedy: str
) -> str:
  """Returns a path that a file states, if it is safe to open.

  The author of a file must not decide where the user's credentials are used.
  A path in a store is safe only within the bucket of the file.

  Args:
    path: the path that the file states.
    file: the file.
    what: what is at the path, for messages.
    remedy: how the user can give the path, for messages.

  Raises:
    UserError: this is no path, or it is not safe to open.
  """
  if not isinstance(path, str) or not path or not path.isprintable():
    raise errors.UserError(
      f'{file} says that {what} is in {ascii(path)[:100]}, which is no '
      f'path: {remedy}'
    )
  # epath also takes `/s3/bucket` for a path in a store.
  here = epath.Path(os.path.abspath(os.path.expanduser(path)))
  is_elsewhere = is_remote(path) or is_remote(here)
  bucket, own = ((scheme(of), split(of)[0]) for of in (path, file))
  if is_elsewhere and not (is_remote(path) and bucket == own):
    raise errors.UserError(
      f'{file} says that {what} is in {path}; what a file says is not looked'
      f' for in an object store unasked: {remedy}'
    )
  return path


def check(path: str | os.PathLike[str]) -> None:
  """Checks that a store is known and its library is installed.

  Raises:
    UserError: the store is unknown or its library is missing.
  """
  if not is_remote(path):
    return
  found = scheme(path)
  if found not in _LIBRARIES:
    raise errors.UserError(
      f'{path}: {found}:// is not known, only gs:// and s3://; mount the'
      ' bucket as a folder'
    )
  library, command = _LIBRARIES[found]
  try:
    fsspec.get_filesystem_class(found)
  except ImportError as error:
    raise errors.UserError(f'{path} needs {library}: {command}') from error


def make_folder(path: epath.Path) -> None:
  """Makes a local folder. In a store, does nothing: fsspec would make a bucket.

  Raises:
    OSError: the folder cannot be made.
  """
  if is_remote(path):
    return
  try:
    path.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise _in_the_way(path) or error from None


def _in_the_way(path: epath.Path) -> OSError | None:
  """Returns the error if a file or a broken link is in a folder's place."""
  for part in (path, *path.parents):
    if os.path.islink(part) and not part.exists():
      return FileNotFoundError(
        f'{part} is a link to {os.readlink(part)}, which is not there'
      )
    if part.is_file():
      return NotADirectoryError(f'{part} is a file')
  return None


def check_writable(what: str, path: epath.Path) -> None:
  """Makes a local folder, or writes a test file to a store.

  Args:
    what: the name of the setting, for messages.
    path: the folder.

  Raises:
    UserError: the folder cannot be written to, the store is unknown, or its
      library is missing.
  """
  check(path)
  with explained(path, f'{what} {path} cannot be written to: '):
    make_folder(path)
    if is_remote(path):
      probe = path / f'.probe-{uuid.uuid4().hex[:8]}'
      write_bytes(probe, b'')
      probe.unlink()


@contextlib.contextmanager
def explained(path: str | os.PathLike[str], before: str = '') -> Iterator[None]:
  """Turns errors in reading or writing files into UserError.

  Args:
    path: the file or folder.
    before: the beginning of the message, before the reason.
  """
  try:
    yield
  except Exception as error:
    if not errors.is_io(error):
      raise
    raise errors.UserError(f'{before}{reason(error, path)}') from error


def reason(error: BaseException, path: str | os.PathLike[str]) -> str:
  """Returns why a file or folder cannot be used; for a store, in one line.

  Args:
    error: what Python or the store's client raised.
    path: the file or folder.
  """
  if not is_remote(path):
    return str(error)
  known, bucket = scheme(path), split(path)[0]
  name, line = type(error).__name__, errors.first_line(error)
  if name == 'NoCredentialsError' or 'Anonymous caller' in line:
    return f'there are no credentials: {_CREDENTIALS.get(known, "set them")}'
  # gcsfs raises the latter two for 403 and 401, s3fs the first for both.
  is_denied = isinstance(error, PermissionError) or line.startswith('Forbidden')
  if is_denied or str(getattr(error, 'code', '')) == '401':
    return f'permission denied by bucket {bucket!r}: {line}'
  if isinstance(error, FileNotFoundError):
    return f'there is no bucket {bucket!r}, or nothing of that name in it'
  return line


def read_bytes(path: epath.PathLike) -> bytes:
  """Returns the content of a file in a store.

  Raises:
    UserError: the file cannot be read, the store is unknown, or its library is
      missing.
  """
  check(path)
  with explained(path):
    return epath.Path(path).read_bytes()


class State(NamedTuple):
  """What differs after a file has changed; times are in nanoseconds.

  Attributes:
    length: in bytes.
    modified: when its content changed; in a store in whole seconds.
    changed: when it changed in any way, on this disk.
    inode: of a file on this disk.
    device: of a file on this disk.
  """

  length: int
  modified: int
  changed: int = 0
  inode: int = 0
  device: int = 0


def state_of(status: os.stat_result) -> State:
  """Returns the state of a file on this disk with this `stat`."""
  return State(
    status.st_size,
    status.st_mtime_ns,
    status.st_ctime_ns,
    status.st_ino,
    status.st_dev,
  )


def state(path: epath.PathLike) -> State:
  """Returns the state of a file.

  Raises:
    OSError: the file cannot be read.
  """
  if not is_remote(path):
    return state_of(os.stat(os.path.expanduser(path)))
  found = epath.Path(path).stat()
  return State(found.length, 10**9 * found.mtime)


def download(path: epath.Path, target: pathlib.Path) -> None:
  """Copies a file from a store to the disk without loading it into memory."""
  system, key = fsspec.core.url_to_fs(os.fspath(path))
  system.get_file(key, os.fspath(target))


@contextlib.contextmanager
def on_this_disk(path: epath.PathLike) -> Iterator[str]:
  """Lends the path of a file on this disk: of its copy if it is in a store."""
  if not is_remote(path):
    yield os.fspath(path)
    return
  with tempfile.TemporaryDirectory(prefix='dst_t5x-') as folder:
    copy = pathlib.Path(folder) / 'file'
    download(epath.Path(path), copy)
    yield os.fspath(copy)


def write_bytes(path: epath.Path, content: bytes) -> None:
  """Writes a file to a store in one request; replaces an older file.

  A file that is opened for writing would be stored when it is closed, also
  after an error.
  """
  system, key = fsspec.core.url_to_fs(os.fspath(path))
  system.pipe_file(key, content)


def key_value_store(path: str | os.PathLike[str]) -> dict[str, Any]:
  """Returns TensorStore's spec of a path in a store; adds no slash.

  For S3, AWS_ENDPOINT_URL and AWS_REGION have the same meaning as for Amazon's
  own clients.
  """
  bucket, key = split(path)
  if scheme(path) == 'gs':
    # The same variable as in Orbax.
    driver = os.environ.get('TENSORSTORE_GCS_BACKEND', 'gcs')
    return {'driver': driver, 'bucket': bucket, 'path': key}
  spec: dict[str, Any] = {'driver': 's3', 'bucket': bucket, 'path': key}
  variables = os.environ
  endpoint = variables.get('AWS_ENDPOINT_URL_S3') or variables.get(
    'AWS_ENDPOINT_URL'
  )
  if endpoint:
    region = variables.get('AWS_REGION') or variables.get('AWS_DEFAULT_REGION')
    spec |= {'endpoint': endpoint, 'aws_region': region or 'us-east-1'}
  if 'AWS_ACCESS_KEY_ID' in variables:
    # By default, TensorStore also looks for others, and logs that it has none.
    spec['aws_credentials'] = {'type': 'environment'}
  return spec


class Mirror:
  """A local folder that is copied to a target, for writers of local files only.

  TensorFlow cannot write to s3://. To append to a file of a store, all of the
  file is written again. For a local target, the folder is the target itself.
  """

  def __init__(
    self, target: str | os.PathLike[str], begin_with: str = ''
  ) -> None:
    """Makes the folder.

    Args:
      target: the folder that `upload` copies to.
      begin_with: pattern of files of the target that will be appended to.
    """
    self._target = epath.Path(target)
    self._sent: dict[pathlib.Path, State] = {}
    if not is_remote(target):
      self.folder = os.fspath(target)
      self._target.mkdir(parents=True, exist_ok=True)
      return
    self.folder = tempfile.mkdtemp(prefix='dst_t5x-')
    weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
    for file in self._target.glob(begin_with) if begin_with else ():
      (pathlib.Path(self.folder) / file.name).write_bytes(file.read_bytes())

  def upload(self) -> None:
    """Copies the files that have changed since the last call."""
    if not is_remote(self._target):
      return
    for file in sorted(pathlib.Path(self.folder).rglob('*')):
      now = state(file)
      if file.is_file() and self._sent.get(file) != now:
        inside = file.relative_to(self.folder)
        write_bytes(self._target / inside, file.read_bytes())
        self._sent[file] = now
