"""Files that are written whole or not at all, by several processes at once."""

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
  """Writes a file under another name first, which then takes its place.

  The other name is nobody else's: of several processes that write one file at
  the same time, the last one's content stays, whole.

  Raises:
    OSError: it cannot be written; an older file is then as it was.
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
      # Else a crash of the machine may leave an empty file under the name.
      os.fsync(f.fileno())
      part.replace(target)
  except BaseException:
    part.unlink(missing_ok=True)
    raise


def sweep(folder: str | os.PathLike[str]) -> None:
  """Removes what processes left in a folder that were killed while writing.

  What is being written at the moment stays, whoever writes it.
  """
  if object_stores.is_remote(folder):
    return
  for part in pathlib.Path(folder).glob('.*.part'):
    # It may be locked, gone, or not ours to remove.
    with contextlib.suppress(OSError):
      if _PART.fullmatch(part.name):
        with part.open('rb') as f:
          fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
          part.unlink()


def _new_part(folder: pathlib.Path) -> tuple[pathlib.Path, IO[bytes]]:
  """Returns a new file, locked until it is closed: see `sweep`."""
  while True:
    part = folder / f'.{uuid.uuid4().hex}.part'
    f = part.open('xb')
    with contextlib.suppress(OSError):  # Some file systems know no locks.
      fcntl.flock(f, fcntl.LOCK_EX)
    if part.exists():
      return part, f
    f.close()  # It was swept before it was locked.
