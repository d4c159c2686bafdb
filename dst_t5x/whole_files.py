"""Files that are written whole or not at all."""

import os

from etils import epath

from dst_t5x import object_stores


def write_text(path: str | os.PathLike[str], text: str) -> None:
  """Writes a text file; see `write_bytes`."""
  write_bytes(path, text.encode())


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
  """Writes a file under another name first, which then takes its place.

  Raises:
    OSError: it cannot be written; an older file is then as it was.
  """
  target = epath.Path(path)
  if object_stores.is_remote(target):
    object_stores.write_bytes(target, content)
    return
  part = target.with_name(f'{target.name}.part')
  try:
    with part.open('wb') as f:
      f.write(content)
      f.flush()
      # Else a crash of the machine may leave an empty file under the name.
      os.fsync(f.fileno())
    part.replace(target)
  except OSError:
    part.unlink(missing_ok=True)
    raise
