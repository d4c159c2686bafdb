"""The format number of run folders and checkpoints."""

import dst_t5x
from dst_t5x.core import json_object
from dst_t5x.core.errors import UserError

# For `run.json` and checkpoints. Increase it when a reader of the last format
# would misread the new one.
FORMAT = 1


def check(said: json_object.JsonObject) -> None:
  """Checks that this version can read a format.

  Args:
    said: the content of `run.json`, or a checkpoint's `about`. If it has no
      `format`, the format is 1.

  Raises:
    UserError: a newer version of the package wrote it.
  """
  found = said.size('format', 1)
  if found > FORMAT:
    raise UserError(
      f'{said.where} has format {found}: a newer dst_t5x wrote it, and this '
      f'one, {dst_t5x.__version__}, reads formats up to {FORMAT}'
    )
