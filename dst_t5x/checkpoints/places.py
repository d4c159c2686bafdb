"""Finds the folder of a path, on a disk or in an object store."""

from collections.abc import Iterator
import contextlib

from etils import epath

from dst_t5x.core import errors
from dst_t5x.core import object_stores


@contextlib.contextmanager
def reached(path: epath.PathLike) -> Iterator[None]:
  """Turns any failure to reach a bucket in the block into a UserError."""
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
  """Returns the path of an existing folder.

  Raises:
    UserError: there is none; the message suggests a similar name.
  """
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
    return ''  # A bucket itself: listing all buckets needs other permissions.
  try:
    known = [child.name for child in folder.parent.iterdir()]
  except FileNotFoundError:
    known = []
  return errors.nearest(folder.name, known)
