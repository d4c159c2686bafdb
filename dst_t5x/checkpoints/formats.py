"""The number of the format in which run folders and checkpoints are written."""

import dst_t5x
from dst_t5x.core import json_object
from dst_t5x.core.errors import UserError

# Of `run.json` and of checkpoints. It goes up whenever a reader of the last one
# would misread what is written now.
FORMAT = 1


def check(said: json_object.JsonObject) -> None:
  """Checks that what was written has a format that is known here.

  Args:
    said: `run.json`, or what a checkpoint says about itself. Without `format`,
      it has the first one.

  Raises:
    UserError: a newer version of the package wrote it.
  """
  found = said.size('format', 1)
  if found > FORMAT:
    raise UserError(
      f'{said.where} has format {found}: a newer dst_t5x wrote it, and this '
      f'one, {dst_t5x.__version__}, reads formats up to {FORMAT}'
    )
