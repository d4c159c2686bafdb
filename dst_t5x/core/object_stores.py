"""Folders in object stores: `gs://bucket/…` and `s3://bucket/…`.

Files there are reached through `etils.epath` and fsspec (gcsfs, s3fs), arrays
through TensorStore. There are no folders and no renaming in such a store, but a
file appears whole or not at all.
"""

from collections.abc import Iterator
import contextlib
import os
import pathlib
import shutil
import tempfile
from typing import Any
import uuid
import weakref

from etils import epath
import fsspec

from dst_t5x.core import errors

# Scheme -> the library that fsspec needs, and how it is installed.
_LIBRARIES = {
  'gs': ('gcsfs', 'pip install gcsfs'),
  's3': ('s3fs', "pip install 'dst_t5x[s3]'"),
}
# Else gcsfs asks Google for credentials and the kind of the bucket each time.
os.environ.setdefault('GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT', 'false')
# Else a process would not see what another one has written since.
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
  """Whether a path is in an object store, known or not."""
  return '://' in os.fspath(path)


def scheme(path: str | os.PathLike[str]) -> str:
  """Returns what stands before `://`, nothing if the path is on a disk."""
  before, separator, _ = os.fspath(path).partition('://')
  return before if separator else ''


def split(path: str | os.PathLike[str]) -> tuple[str, str]:
  """Returns bucket and key of a path in an object store."""
  bucket, _, key = os.fspath(path).partition('://')[2].partition('/')
  return bucket, key


def stated(
  path: Any, file: str | os.PathLike[str], what: str, remedy: str
) -> str:
  """Returns a path that a file states, if it may be followed unasked.

  Whoever wrote the file must not choose where the user's credentials are used:
  a path in a store is followed only within the bucket that the file is in.

  Args:
    path: what the file states.
    file: where that was read.
    what: what is there, for messages.
    remedy: how the user asks for it.

  Raises:
    UserError: it is no path, or has to be asked for.
  """
  if not isinstance(path, str) or not path or not path.isprintable():
    raise errors.UserError(
      f'{file} says that {what} is in {ascii(path)[:100]}, which is no '
      f'path: {remedy}'
    )
  # For epath `/s3/bucket` is in a store, too.
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
  """Checks that a store is a known one, and its library is installed.

  Raises:
    UserError: it is not.
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
  """Makes a folder; a store has none, and fsspec would make a bucket instead.

  Raises:
    OSError: it cannot be made.
  """
  if is_remote(path):
    return
  try:
    path.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise _in_the_way(path) or error from None


def _in_the_way(path: epath.Path) -> OSError | None:
  """Returns why a folder cannot be made, if a file or a link says it."""
  for part in (path, *path.parents):
    if os.path.islink(part) and not part.exists():
      return FileNotFoundError(
        f'{part} is a link to {os.readlink(part)}, which is not there'
      )
    if part.is_file():
      return NotADirectoryError(f'{part} is a file')
  return None


def check_writable(what: str, path: epath.Path) -> None:
  """Makes a folder, or makes sure that files can be written to a store.

  Args:
    what: the name of the setting.
    path: the folder.

  Raises:
    UserError: they cannot, or the store or its library is not known.
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
  """Raises UserError where a file cannot be read or written.

  Args:
    path: where to.
    before: what is said before the reason.
  """
  try:
    yield
  except Exception as error:
    if not errors.is_io(error):
      raise
    raise errors.UserError(f'{before}{reason(error, path)}') from error


def reason(error: BaseException, path: str | os.PathLike[str]) -> str:
  """Returns why a folder cannot be used; of a store, in one line.

  Args:
    error: what its client raised.
    path: where to.
  """
  if not is_remote(path):
    return str(error)
  known, bucket = scheme(path), split(path)[0]
  name, line = type(error).__name__, errors.first_line(error)
  if name == 'NoCredentialsError' or 'Anonymous caller' in line:
    return f'there are no credentials: {_CREDENTIALS.get(known, "set them")}'
  # What gcsfs makes of the statuses 401 and 403, and s3fs of both.
  is_denied = isinstance(error, PermissionError) or line.startswith('Forbidden')
  if is_denied or str(getattr(error, 'code', '')) == '401':
    return f'permission denied by bucket {bucket!r}: {line}'
  if isinstance(error, FileNotFoundError):
    return f'there is no bucket {bucket!r}, or nothing of that name in it'
  return line


def read_bytes(path: epath.PathLike) -> bytes:
  """Returns the content of a file in a store.

  Raises:
    UserError: it cannot be read, or the store or its library is not known.
  """
  check(path)
  with explained(path):
    return epath.Path(path).read_bytes()


def download(path: epath.Path, target: pathlib.Path) -> None:
  """Copies a file of a store to this disk, without holding it in memory."""
  system, key = fsspec.core.url_to_fs(os.fspath(path))
  system.get_file(key, os.fspath(target))


def write_bytes(path: epath.Path, content: bytes) -> None:
  """Writes a file whole or not at all; an older one is replaced.

  A file that is opened, as on a disk, would be stored by what closes it even
  after an error.
  """
  system, key = fsspec.core.url_to_fs(os.fspath(path))
  system.pipe_file(key, content)


def key_value_store(path: str | os.PathLike[str]) -> dict[str, Any]:
  """Returns TensorStore's spec of a place in a store, without a slash added.

  Of S3 the variables are heeded that all of Amazon's clients heed:
  AWS_ENDPOINT_URL for stores of others, AWS_REGION.
  """
  bucket, key = split(path)
  if scheme(path) == 'gs':
    driver = os.environ.get('TENSORSTORE_GCS_BACKEND', 'gcs')  # As Orbax does.
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
    # They go first anyway, but others would be looked for, and missed aloud.
    spec['aws_credentials'] = {'type': 'environment'}
  return spec


class Mirror:
  """A folder on this machine, for writers that know only such folders.

  TensorFlow writes to gs:// but not to s3://, and adds to a file by writing all
  of it again, as this does. On a disk the folder is the target itself.
  """

  def __init__(
    self, target: str | os.PathLike[str], begin_with: str = ''
  ) -> None:
    """Makes the folder.

    Args:
      target: where its files shall be, at the latest after `upload`.
      begin_with: pattern of files that are there and will be added to.
    """
    self._target = epath.Path(target)
    self._sent: dict[pathlib.Path, tuple[int, int]] = {}
    if not is_remote(target):
      self.folder = os.fspath(target)
      self._target.mkdir(parents=True, exist_ok=True)
      return
    self.folder = tempfile.mkdtemp(prefix='dst_t5x-')
    weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
    for file in self._target.glob(begin_with) if begin_with else ():
      (pathlib.Path(self.folder) / file.name).write_bytes(file.read_bytes())

  def upload(self) -> None:
    """Copies what has changed since the last time."""
    if not is_remote(self._target):
      return
    for file in sorted(pathlib.Path(self.folder).rglob('*')):
      state = (file.stat().st_size, file.stat().st_mtime_ns)
      if file.is_file() and self._sent.get(file) != state:
        inside = file.relative_to(self.folder)
        write_bytes(self._target / inside, file.read_bytes())
        self._sent[file] = state
