"""What makes a run this run: the configuration that MODEL_DIR belongs to."""

from collections.abc import Callable, Mapping
import os
import re
from typing import Any

from etils import epath

from dst_t5x import checkpoints
from dst_t5x import config
from dst_t5x.errors import UserError

# Bindings that may differ between two calls for the same run: they change
# nothing of what is computed in a step.
_MAY_CHANGE = re.compile(
  r'\.train\.(model_dir|initial_checkpoint_path|only_check)$'
  r'|\.Plan\.|\.evaluation\.|\.Evaluation\.|\.decoding\.|\.Partitioner\.'
)


def of(binary: Callable[..., Any]) -> dict[str, str]:
  """Returns the bindings that make the run, as gin is configured now.

  Args:
    binary: what gin configured.
  """
  return {
    name: value
    for name, value in config.bindings(binary).items()
    if not _MAY_CHANGE.search(name)
  }


def check(
  model_dir: str | os.PathLike[str], identity: Mapping[str, str]
) -> None:
  """Checks that the folder is empty or that of a run.

  Args:
    model_dir: MODEL_DIR.
    identity: `of` the run.

  Raises:
    UserError: the folder's run had another configuration.
  """
  path = epath.Path(model_dir)
  if not checkpoints.is_run(path):
    return
  before = checkpoints.read_run_file(path)['config']
  for name in sorted(before.keys() | identity.keys()):
    old, new = before.get(name), identity.get(name)
    if old != new:
      raise UserError(
        f'the run in MODEL_DIR {path} has {name} = {old}, not {new}: '
        'go on with that, or choose another MODEL_DIR'
      )
