"""The folder that a path means, in a store or on a disk."""

from collections.abc import Iterator
import contextlib

from etils import epath

from dst_t5x.core import errors
from dst_t5x.core import object_stores


@contextlib.contextmanager
def reached(path: epath.PathLike) -> Iterator[None]:
  """Raises UserError where a bucket cannot be reached, whatever the client."""
  object_stores.check(path)
  try:
    yield
  except errors.UserError:
    raise
  except Exception as e:
    if not object_stores.is_remote(path):
      raise
    raise errors.UserError(
      f'cannot reach {path}: {object_stores.reason(e, path)}'
    ) from e


def existing_folder(path: epath.PathLike) -> epath.Path:
  """Returns the path of a folder; names the nearest if it is misspelt."""
  folder = epath.Path(path).expanduser()
  if folder.is_dir():
    return folder
  if folder.exists():
    raise errors.UserError(f'{folder} is a file; give its folder')
  if object_stores.is_remote(folder):
    raise errors.UserError(
      f'there is no {folder}, or no such bucket{_nearest_beside(folder)}'
    )
  missing = folder
  while missing.parent != missing and not missing.parent.exists():
    missing = missing.parent
  known = []
  if missing.parent.is_dir():
    known = [child.name for child in missing.parent.iterdir()]
  raise errors.UserError(
    f'there is no {folder}: nothing called {missing.name!r} in'
    f' {missing.parent}{errors.nearest(missing.name, known)}'
  )


def _nearest_beside(folder: epath.Path) -> str:
  """Returns `; did you mean 'x'?` for what is beside a folder in a store."""
  if not object_stores.split(folder)[1]:
    return ''  # A bucket; others' are not ours to list.
  try:
    known = [child.name for child in folder.parent.iterdir()]
  except FileNotFoundError:
    known = []
  return errors.nearest(folder.name, known)
