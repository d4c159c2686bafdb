"""Packages that are not part of the base install, and what installs them."""

from collections.abc import Iterator
import contextlib
import sys

from dst_t5x.core.errors import UserError, first_line

_TASKS = frozenset(
  ('seqio', 't5', 'tensorflow', 'tensorflow_datasets', 'tensorflow_text')
)


def is_of_tasks(module: str | None) -> bool:
  """Returns whether the extra `tasks` installs a module."""
  return module is not None and module.split('.')[0] in _TASKS


def missing(package: str) -> UserError:
  """Returns the error that a package of the extra `tasks` is missing."""
  return UserError(
    f'tasks and their vocabularies need {package}, which is not installed:'
    " pip install 'dst_t5x[tasks]', or train from stored batches, see"
    ' gin/runs/from_batches.gin'
  )


@contextlib.contextmanager
def explained() -> Iterator[None]:
  """Around a command's imports: prints what is missing as one line, exits."""
  try:
    yield
  except UserError as error:
    sys.exit(f'error: {first_line(error)}')
