"""The subsets that a server knows: files on the disk, some of them in memory.

    DIR/<name>.dst            by name; here until someone deletes it
    DIR/.sent/<sha256>.dst    came with a request; the one not used for longest
                              makes room for others

Every file is checked as a stranger's when it is read. A name whose file was
replaced stands for the new one from then on.
"""

from collections.abc import Hashable
import dataclasses
import hashlib
import os
import pathlib
import re
import threading
from typing import Any, NamedTuple

import cachetools
import numpy as np

from dst_t5x import errors
from dst_t5x import subset as subset_lib
from dst_t5x.errors import UserError
from dst_t5x.serving import model as model_lib
from dst_t5x.serving import placement

SENT = '.sent'
SENT_PREFIX = 'sha256:'
_NAME = re.compile(r'[A-Za-z0-9][A-Za-z0-9._-]{0,99}')
_SUFFIX = '.dst'


class NotFoundError(UserError):
  """There is no subset of this name."""


class TooLargeError(UserError):
  """A subset has more entries or bytes than the server takes."""


class FullError(UserError):
  """There is no room for another subset."""


@dataclasses.dataclass(frozen=True)
class Limits:
  """How much of what; in bytes unless it says otherwise.

  Attributes:
    upload_bytes: a file.
    share: of the parameters that a subset may have.
    disk_bytes: all files with names.
    sent_bytes: all files that came with requests.
    host_bytes: the subsets in memory.
  """

  upload_bytes: int = 64 * 2**20
  share: float = 0.1
  disk_bytes: int = 10 * 2**30
  sent_bytes: int = 2**30
  host_bytes: int = 2**30


class Known(NamedTuple):
  """A subset in memory.

  Attributes:
    subset: checked; it is one of the server's seed.
    about: the file's metadata.
    file_bytes: the file's size.
  """

  subset: subset_lib.Subset
  about: dict[str, Any]
  file_bytes: int

  @property
  def nbytes(self) -> int:
    """Bytes of its positions and values."""
    arrays = (*self.subset.positions.values(), *self.subset.values.values())
    return sum(array.nbytes for array in arrays)


class Library:
  """All subsets of a folder; safe to use from several threads."""

  def __init__(
    self, folder: str, layout: placement.Layout, limits: Limits = Limits()
  ) -> None:
    """Makes the folder if there is none.

    Args:
      folder: where the files are.
      layout: of the seed that they must belong to.
      limits: see there.

    Raises:
      UserError: the folder cannot be used.
    """
    self.limits = limits
    self._folder = pathlib.Path(folder)
    self._layout = layout
    self._lock = threading.RLock()
    self.host: cachetools.LRUCache[Hashable, Known] = cachetools.LRUCache(
      limits.host_bytes, lambda known: known.nbytes
    )
    self.counts = dict.fromkeys(
      ('host_hits', 'host_misses', 'sent_evictions'), 0
    )
    with errors.writing(f'the folder of subsets {folder}'):
      (self._folder / SENT).mkdir(parents=True, exist_ok=True)

  def names(self) -> list[str]:
    """Returns the names, in order."""
    found = (path.stem for path in self._folder.glob(f'*{_SUFFIX}'))
    return sorted(name for name in found if _NAME.fullmatch(name))

  def key(self, name: str) -> Hashable:
    """Returns what stands for the present content of a name's file.

    Raises:
      NotFoundError: there is none of this name.
    """
    path = self._path(name)
    try:
      status = path.stat()
    except OSError as e:
      raise NotFoundError(self._no(name)) from e
    return name, status.st_mtime_ns, status.st_size, status.st_ino

  def get(self, name: str) -> Known:
    """Returns a subset.

    Raises:
      NotFoundError: there is none of this name.
      UserError: its file is damaged, or not of this seed.
    """
    key = self.key(name)
    with self._lock:
      if (known := self.host.get(key)) is not None:
        self.counts['host_hits'] += 1
        return known
      self.counts['host_misses'] += 1
    path = self._path(name)
    try:
      blob = path.read_bytes()
      os.utime(path) if name.startswith(SENT_PREFIX) else None
    except OSError as e:
      raise NotFoundError(self._no(name)) from e
    known = self._checked(blob, name)
    with self._lock:
      if known.nbytes <= self.host.maxsize:
        self.host[key] = known
    return known

  def row(self, name: str, tokens: np.ndarray) -> model_lib.Row:
    """Returns what a model decodes with a subset.

    Raises:
      NotFoundError: there is none of this name.
      UserError: its file is damaged, or not of this seed.
    """
    key, known = self.key(name), self.get(name)
    return model_lib.Row(tokens, key, lambda: known.subset)

  def add(self, name: str, blob: bytes) -> Known:
    """Keeps a file under a name, whole or not at all.

    Raises:
      TooLargeError: there is too much in it.
      FullError: there is no room for it.
      UserError: the name cannot be one, or the file is not a subset of this
        seed.
    """
    path = self._path(name)
    known = self._checked(blob, name)
    with self._lock:
      others = sum(_size(p) for p in self._files(self._folder) if p != path)
      if others + len(blob) > self.limits.disk_bytes:
        raise FullError(
          f'there is no room for {name}: {others:,} of'
          f' {self.limits.disk_bytes:,} bytes are taken; delete a subset'
        )
      _write(path, blob)
      self.host.pop(self.key(name), None)
    return known

  def send(self, blob: bytes) -> str:
    """Keeps what came with a request; returns a name for it.

    Raises:
      TooLargeError: there is too much in it.
      UserError: it is not a subset of this seed.
    """
    name = SENT_PREFIX + hashlib.sha256(blob).hexdigest()
    path = self._path(name)
    with self._lock:
      if path.exists():
        os.utime(path)
        return name
    known = self._checked(blob, 'the subset that was sent')
    with self._lock:
      self._make_room(len(blob))
      _write(path, blob)
      if known.nbytes <= self.host.maxsize:
        self.host[self.key(name)] = known
    return name

  def delete(self, name: str) -> None:
    """Deletes a name's file.

    Raises:
      NotFoundError: there is none of this name.
    """
    with self._lock:
      key = self.key(name)
      self._path(name).unlink(missing_ok=True)
      self.host.pop(key, None)

  def _checked(self, blob: bytes, name: str) -> Known:
    """Returns a file's content, checked as a stranger's."""
    if len(blob) > self.limits.upload_bytes:
      raise TooLargeError(
        f'{name} has {len(blob):,} bytes, more than the'
        f' {self.limits.upload_bytes:,} that this server takes'
      )
    try:
      subset, about = subset_lib.from_bytes(blob)
      self._layout.check(subset)
    except UserError as e:
      raise UserError(f'{name}: {str(e).removeprefix("subset: ")}') from e
    most = int(self.limits.share * self._layout.size)
    if subset.size > most:
      raise TooLargeError(
        f'{name} has {subset.size:,} values, more than the {most:,} that this'
        ' server takes'
      )
    # The seed's own table, which all subsets share.
    subset = dataclasses.replace(subset, tensors=self._layout.types)
    return Known(subset, about, len(blob))

  def _path(self, name: str) -> pathlib.Path:
    digest = name.removeprefix(SENT_PREFIX)
    if digest != name and re.fullmatch('[0-9a-f]{64}', digest):
      return self._folder / SENT / f'{digest}{_SUFFIX}'
    if not _NAME.fullmatch(name):
      raise NotFoundError(
        f'{name!r} is no name of a subset: letters, digits and ._- after a'
        ' letter or digit, at most 100'
      )
    return self._folder / f'{name}{_SUFFIX}'

  def _no(self, name: str) -> str:
    if name.startswith(SENT_PREFIX):
      return f'{name} is not kept any more: send the subset again'
    return f'there is no subset {name!r}{errors.nearest(name, self.names())}'

  def _files(self, folder: pathlib.Path) -> list[pathlib.Path]:
    return list(folder.glob(f'*{_SUFFIX}'))

  def _make_room(self, size: int) -> None:
    files = self._files(self._folder / SENT)
    taken = sum(map(_size, files))
    for path in sorted(files, key=lambda path: path.stat().st_mtime_ns):
      if taken + size <= self.limits.sent_bytes:
        return
      taken -= _size(path)
      path.unlink(missing_ok=True)
      self.counts['sent_evictions'] += 1


def _size(path: pathlib.Path) -> int:
  return path.stat().st_size


def _write(path: pathlib.Path, blob: bytes) -> None:
  """Writes a file, whole or not at all."""
  part = path.with_name(f'{path.name}.part')
  with errors.writing(str(path)):
    with part.open('wb') as f:
      f.write(blob)
      f.flush()
      os.fsync(f.fileno())
    part.replace(path)
