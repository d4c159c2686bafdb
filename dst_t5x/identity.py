"""What a run is: the configuration that a MODEL_DIR belongs to."""

from collections.abc import Callable, Mapping
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


def identity(binary: Callable[..., Any]) -> dict[str, str]:
  """Returns the bindings that make a run what it is.

  Args:
    binary: what gin configured.
  """
  return {
    name: value
    for name, value in config.bindings(binary).items()
    if not _MAY_CHANGE.search(name)
  }


def check_folder(path: epath.Path, now: Mapping[str, str]) -> None:
  """Checks that a folder is empty, or that of a run which is the same.

  Args:
    path: MODEL_DIR.
    now: the `identity`.

  Raises:
    UserError: the folder's run had another configuration.
  """
  if not checkpoints.is_run(path):
    return
  before = checkpoints.read_run_file(path)['config']
  for name in sorted(before.keys() | now.keys()):
    if before.get(name) != now.get(name):
      raise UserError(
        f'the run in MODEL_DIR {path} has {name} = {before.get(name)}, not '
        f'{now.get(name)}: go on with that, or choose another MODEL_DIR'
      )
