"""Atomic writing of files, also by several processes at once."""

import contextlib
import fcntl
import os
import pathlib
import re
from typing import IO
import uuid

from dst_t5x.core import data_folders

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
  if _is_remote(path):
    _write_to_store(path, content)
    return
  target = pathlib.Path(path)
  part, f = _new_part(target.parent)
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


def open_to_read(path: str | os.PathLike[str]) -> IO[bytes]:
  """Opens a file on this disk or in a store.

  Raises:
    OSError: the file cannot be read.
  """
  if _is_remote(path):
    from etils import epath  # Not there beside PyTorch alone.

    return epath.Path(path).open('rb')
  return open(os.path.expanduser(path), 'rb')


def sweep(folder: str | os.PathLike[str]) -> None:
  """Removes temporary files of processes that were killed while writing.

  Files that a process is still writing stay: they are locked.
  """
  if _is_remote(folder):
    return
  for part in pathlib.Path(folder).glob('.*.part'):
    # The file may be locked, deleted, or another user's.
    with contextlib.suppress(OSError):
      if _PART.fullmatch(part.name):
        with part.open('rb') as f:
          fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
          part.unlink()


def _is_remote(path: str | os.PathLike[str]) -> bool:
  text = os.fspath(path)
  # epath also takes `/s3/bucket` for a path in a store.
  return data_folders.is_remote(text) or text.startswith(('/gs/', '/s3/'))


def _write_to_store(path: str | os.PathLike[str], content: bytes) -> None:
  # These libraries are not there beside PyTorch alone.
  from etils import epath

  from dst_t5x.core import object_stores

  object_stores.write_bytes(epath.Path(path), content)


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
