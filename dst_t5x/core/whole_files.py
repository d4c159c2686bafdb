"""Atomic writing of files, also by several processes at once."""

import contextlib
import fcntl
import os
import pathlib
import re
from typing import IO
import uuid

from etils import epath

from dst_t5x.core import object_stores

_PART = re.compile(r'\.[0-9a-f]{32}\.part')


def write_text(path: str | os.PathLike[str], text: str) -> None:
  """Writes a text file; see `write_bytes`."""
  write_bytes(path, text.encode())


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
  """Writes a temporary file and renames it.

  The temporary file's name is unique. If several processes write the same file,
  the content of the last one stays.

  Raises:
    OSError: the file cannot be written; an older file stays as it is.
  """
  target = epath.Path(path)
  if object_stores.is_remote(target):
    object_stores.write_bytes(target, content)
    return
  part, f = _new_part(pathlib.Path(target).parent)
  try:
    with f:
      f.write(content)
      f.flush()
      # Without this, a crash of the machine may leave an empty file.
      os.fsync(f.fileno())
      part.replace(target)
  except BaseException:
    part.unlink(missing_ok=True)
    raise


def sweep(folder: str | os.PathLike[str]) -> None:
  """Removes temporary files of processes that were killed while writing.

  Files that a process is still writing stay: they are locked.
  """
  if object_stores.is_remote(folder):
    return
  for part in pathlib.Path(folder).glob('.*.part'):
    # The file may be locked, deleted, or another user's.
    with contextlib.suppress(OSError):
      if _PART.fullmatch(part.name):
        with part.open('rb') as f:
          fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
          part.unlink()


def _new_part(folder: pathlib.Path) -> tuple[pathlib.Path, IO[bytes]]:
  """Returns a new file that is locked until it is closed.

  The lock is for `sweep`. `tempfile` has none, and its files cannot
  be told from those of other programs.
  """
  while True:
    part = folder / f'.{uuid.uuid4().hex}.part'
    f = part.open('xb')
    with contextlib.suppress(OSError):  # Some file systems have no locks.
      fcntl.flock(f, fcntl.LOCK_EX)
    if part.exists():
      return part, f
    f.close()  # Another process removed it before it was locked.
