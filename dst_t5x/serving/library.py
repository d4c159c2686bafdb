"""The server's subsets: files on disk, some of them also in memory.

    DIR/<name>.dst            named by the user; kept until deleted
    DIR/.sent/<sha256>.dst    sent with a request; the least recently used is
                              deleted to make room

A name maps to a file, and the file to the SHA-256 of its content. Memory and
device identify a subset by this digest. When a name's file is replaced, new
requests use the new subset, and requests under way keep the old one. Files are
untrusted: each is checked when it is read. Several servers can share a folder.
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import os
import pathlib
import re
import stat
import threading
import time
from typing import NamedTuple

from absl import logging
import cachetools
import numpy as np

from dst_t5x import subsets as subset_lib
from dst_t5x.core import errors
from dst_t5x.core import whole_files
from dst_t5x.core.errors import UserError
from dst_t5x.serving import contents
from dst_t5x.serving import facts as facts_lib
from dst_t5x.serving import model as model_lib
from dst_t5x.subsets import extraction
from dst_t5x.subsets import metadata
from dst_t5x.subsets import on_device

SENT = '.sent'
SENT_PREFIX = 'sha256:'
_NAME = re.compile(r'[A-Za-z0-9][A-Za-z0-9._-]{0,99}')
_DIGEST = re.compile('[0-9a-f]{64}')
_SUFFIX = '.dst'
_MOST_VERDICTS = 2**14


class NotFoundError(UserError):
  """There is no subset with this name."""


class TooLargeError(UserError):
  """A subset has more entries or bytes than the server accepts."""


class FullError(UserError):
  """There is no room for another subset."""


@dataclasses.dataclass(frozen=True)
class Limits:
  """The library's limits, in bytes except `share`.

  Attributes:
    upload_bytes: of one file.
    share: the largest share of the parameters that a subset may have.
    disk_bytes: of all named files.
    sent_bytes: of all files sent with requests.
    host_bytes: of the subsets in memory.
  """

  upload_bytes: int = 64 * 2**20
  share: float = 0.1
  disk_bytes: int = 10 * 2**30
  sent_bytes: int = 2**30
  host_bytes: int = 2**30


class Known(NamedTuple):
  """A subset in memory.

  Attributes:
    facts: what the server shows of it.
    subset: the subset, checked to belong to the server's seed.
  """

  facts: facts_lib.Facts
  subset: subset_lib.Subset

  @property
  def nbytes(self) -> int:
    """The bytes of its positions and values."""
    arrays = (*self.subset.positions.values(), *self.subset.values.values())
    return sum(array.nbytes for array in arrays)

  def row(self, tokens: np.ndarray) -> model_lib.Row:
    """Returns the row that decodes tokens, int32 [length], with this subset."""
    return model_lib.Row(tokens, self.facts.digest, lambda: self.subset)


class _Wrong(NamedTuple):
  """A file's error; `text` is the message without the subset's name."""

  kind: type[UserError]
  text: str


class Library:
  """The subsets of a folder. Thread-safe."""

  def __init__(
    self, folder: str, layout: on_device.Layout, limits: Limits = Limits()
  ) -> None:
    """Makes the folder if there is none.

    Args:
      folder: the folder of the files.
      layout: the layout of the seed that the subsets must belong to.
      limits: see `Limits`.

    Raises:
      UserError: the folder cannot be used.
    """
    self.limits = limits
    self._folder = pathlib.Path(folder)
    self._layout = layout
    self._writing = threading.Lock()
    self._lock = threading.Lock()  # Guards the fields below.
    self.host: cachetools.LRUCache[str, Known] = cachetools.LRUCache(
      limits.host_bytes, lambda known: known.nbytes
    )
    self._verdicts: cachetools.LRUCache[str, facts_lib.Facts | _Wrong] = (
      cachetools.LRUCache(_MOST_VERDICTS)
    )
    self.counts = dict.fromkeys(
      ('host_hits', 'host_misses', 'sent_evictions'), 0
    )
    self._digests = contents.Digests()
    with errors.writing(f'the folder of subsets {folder}'):
      (self._folder / SENT).mkdir(parents=True, exist_ok=True)
    for swept in (self._folder, self._folder / SENT):
      whole_files.sweep(swept)

  def names(self) -> list[str]:
    """Returns all names, sorted; those of unreadable files too."""
    return sorted(
      path.stem
      for path in self._folder.glob(f'*{_SUFFIX}')
      if _NAME.fullmatch(path.stem) and not os.path.isdir(path)
    )

  def find(self, name: str) -> Known:
    """Returns the subset that a name stands for now.

    Raises:
      NotFoundError: there is no subset with this name.
      UserError: its file is damaged, or belongs to another seed.
    """
    if name.startswith(SENT_PREFIX):
      return self._find_sent(name)
    path = self._path(name)
    with self._reading(name):
      known = self._in_memory(self._digests.get(path.stat()))
    return known or self._known(self._read(path, name), name)

  def facts(self, name: str) -> facts_lib.Facts:
    """Returns what the server shows of a subset.

    A file that has not changed is not read again.

    Raises:
      NotFoundError: there is no subset with this name.
      UserError: its file is damaged, or belongs to another seed.
    """
    if name.startswith(SENT_PREFIX):
      return self._find_sent(name).facts
    path = self._path(name)
    with self._reading(name):
      digest = self._digests.get(path.stat())
    with self._lock:
      verdict = self._verdicts.get(digest) if digest else None
    if verdict is None:
      return self._known(self._read(path, name), name).facts
    return _passed(verdict, name)

  def add(self, name: str, blob: bytes) -> facts_lib.Facts:
    """Writes a file under a name, atomically, and returns its facts.

    Raises:
      TooLargeError: the file or the subset is too large.
      FullError: there is no room for it.
      UserError: the name is invalid, or the file is not a subset of this seed.
    """
    path = self._path(name)
    if os.path.isdir(path):
      raise UserError(f'{name}{_SUFFIX} is a folder: choose another name')
    known = self._known(contents.of(blob), name)
    with self._writing:
      files = _files(self._folder)
      taken = sum(status.st_size for other, status in files if other != path)
      if taken + len(blob) > self.limits.disk_bytes:
        raise FullError(
          f'there is no room for {name}: {taken:,} of'
          f' {self.limits.disk_bytes:,} bytes are taken; delete a subset'
        )
      try:
        whole_files.write_bytes(path, blob)
      except OSError as e:
        logging.error('%s cannot be kept: %s', name, e)
        raise FullError(
          f'the server cannot keep {name}: {e.strerror or type(e).__name__}'
        ) from e
    return known.facts

  def send(self, blob: bytes) -> Known:
    """Returns the subset that was sent with a request, and stores its file.

    The file stays until its space is needed. If it cannot be stored, the client
    has to send it again.

    Raises:
      TooLargeError: the file or the subset is too large.
      UserError: the file is not a subset of this seed.
    """
    content = contents.of(blob)
    known = self._known(content, 'the subset that was sent')
    path = self._sent(content.digest)
    with self._writing:
      try:
        if not (path.exists() and path.read_bytes() == blob):
          if len(blob) > self.limits.sent_bytes:
            return known
          self._make_room(len(blob), path)
          whole_files.write_bytes(path, blob)
        _touch(path)
      except OSError as e:
        logging.error('a subset that was sent cannot be kept: %s', e)
    return known

  def delete(self, name: str) -> None:
    """Deletes a name's file.

    Raises:
      NotFoundError: there is no subset with this name.
    """
    path = self._path(name)
    with self._reading(name):
      if os.path.isdir(path):
        raise NotFoundError(self._no(name))
      path.unlink()

  def _find_sent(self, name: str) -> Known:
    """Returns a subset that was sent with a request, by its digest."""
    digest = name.removeprefix(SENT_PREFIX)
    if not _DIGEST.fullmatch(digest):
      raise NotFoundError(f'{name!r} is not the name of a subset that was sent')
    path = self._sent(digest)
    if (known := self._in_memory(digest)) is None:
      try:
        content = self._digests.read(path)
        if content.digest != digest:
          path.unlink()  # Damaged.
          raise FileNotFoundError
      except OSError as e:
        raise NotFoundError(
          f'{name} is no longer stored: send the subset again'
        ) from e
      known = self._known(content, name)
    with contextlib.suppress(OSError):  # Another server may have removed it.
      _touch(path)
    return known

  def _in_memory(self, digest: str | None) -> Known | None:
    with self._lock:
      known = self.host.get(digest) if digest else None
      self.counts['host_hits'] += known is not None
      return known

  def _read(self, path: pathlib.Path, name: str) -> contents.Content:
    """Returns the content of a file, after checking its type and size."""
    with self._reading(name):
      status = path.stat()
      if stat.S_ISDIR(status.st_mode):
        raise FileNotFoundError
      if not stat.S_ISREG(status.st_mode):
        raise UserError(f'{name} is no file')
      self._check_bytes(status.st_size, name)
      return self._digests.read(path)

  @contextlib.contextmanager
  def _reading(self, name: str) -> Iterator[None]:
    """Turns OSErrors about a name's file into UserErrors."""
    try:
      yield
    except FileNotFoundError as e:
      if self._path(name).is_symlink():
        raise UserError(f'{name} is a link to a file that is not there') from e
      raise NotFoundError(self._no(name)) from e
    except OSError as e:
      raise UserError(f'{name} cannot be read: {e.strerror}') from e

  def _known(self, content: contents.Content, name: str) -> Known:
    """Returns a content's subset from memory, or checks and caches it."""
    if (known := self._in_memory(content.digest)) is not None:
      return known
    try:
      known = self._checked(content, name)
    except UserError as e:
      verdict = _Wrong(type(e), str(e).removeprefix(name))
      with self._lock:
        self._verdicts[content.digest] = verdict
      raise
    with self._lock:
      self.counts['host_misses'] += 1
      self._verdicts[content.digest] = known.facts
      if known.nbytes <= self.host.maxsize:
        self.host[content.digest] = known
    return known

  def _checked(self, content: contents.Content, name: str) -> Known:
    blob, digest = content
    self._check_bytes(len(blob), name)
    try:
      subset, about = subset_lib.from_bytes(blob)
      self._layout.check(subset)
      extraction.check_finite(subset)
    except UserError as e:
      raise UserError(f'{name}: {str(e).removeprefix("subset: ")}') from e
    most = int(self.limits.share * self._layout.size)
    if subset.size > most:
      raise TooLargeError(
        f'{name} has {subset.size:,} values, more than the {most:,} that this'
        ' server takes'
      )
    # All subsets share the seed's table of tensors.
    subset = dataclasses.replace(subset, tensors=self._layout.types)
    shown = metadata.shown(about)
    return Known(facts_lib.Facts(digest, subset.size, len(blob), shown), subset)

  def _check_bytes(self, size: int, name: str) -> None:
    if size > self.limits.upload_bytes:
      raise TooLargeError(
        f'{name} has {size:,} bytes, more than the'
        f' {self.limits.upload_bytes:,} that this server takes'
      )

  def _path(self, name: str) -> pathlib.Path:
    if not _NAME.fullmatch(name):
      raise NotFoundError(
        f'{name!r} cannot name a subset: a name has at most 100 letters, digits'
        ' and ._- and begins with a letter or digit'
      )
    return self._folder / f'{name}{_SUFFIX}'

  def _sent(self, digest: str) -> pathlib.Path:
    return self._folder / SENT / f'{digest}{_SUFFIX}'

  def _no(self, name: str) -> str:
    return f'there is no subset {name!r}{errors.nearest(name, self.names())}'

  def _make_room(self, size: int, path: pathlib.Path) -> None:
    """Deletes files sent with requests until another one has room."""
    files = [file for file in _files(self._folder / SENT) if file[0] != path]
    taken = sum(status.st_size for _, status in files)
    for other, status in sorted(files, key=lambda file: file[1].st_mtime_ns):
      if taken + size <= self.limits.sent_bytes:
        return
      taken -= status.st_size
      other.unlink(missing_ok=True)
      self.counts['sent_evictions'] += 1


def _passed(verdict: facts_lib.Facts | _Wrong, name: str) -> facts_lib.Facts:
  """Returns the facts of a file that passed its check.

  Raises:
    UserError: the file did not pass.
  """
  if isinstance(verdict, _Wrong):
    raise verdict.kind(f'{name}{verdict.text}')
  return verdict


def _files(
  folder: pathlib.Path,
) -> list[tuple[pathlib.Path, os.stat_result]]:
  """Returns the files of subsets and their `lstat`: links are not followed."""
  found = []
  for path in folder.glob(f'*{_SUFFIX}'):
    with contextlib.suppress(OSError):  # Another server may have removed it.
      if not stat.S_ISDIR((status := path.lstat()).st_mode):
        found.append((path, status))
  return found


def _touch(path: pathlib.Path) -> None:
  """Sets a file's times to now, from a clock finer than the file system's."""
  now = time.time_ns()
  os.utime(path, ns=(now, now))
