"""Text files that are written whole or not at all."""

import os

from etils import epath


def write_text(path: str | os.PathLike[str], text: str) -> None:
  """Writes a file under another name first, which then takes its place.

  Raises:
    OSError: it cannot be written; an older file is then as it was.
  """
  target = epath.Path(path)
  part = target.with_name(f'{target.name}.part')
  part.write_text(text)
  part.replace(target)
