"""The parameters of a checkpoint that T5X wrote through Orbax, its default now.

A folder `checkpoint_<step>` holds `state`, an Orbax tree of `target` and of the
optimizer's `state`, and `dataset`, the position in the data.
"""

from typing import Any

from etils import epath
import jax
import numpy as np
import orbax.checkpoint as ocp

from dst_t5x import errors
from dst_t5x import object_stores
from dst_t5x import orbax_on_s3

STATE = 'state'


def is_checkpoint(folder: epath.Path) -> bool:
  """Whether a folder `checkpoint_<step>` is in this format."""
  return (folder / STATE / '_METADATA').exists()


def load(folder: epath.Path) -> tuple[dict[str, Any], int]:
  """Reads the parameters, and only those; returns them and the step.

  Raises:
    UserError: a part is missing or damaged, or there are no parameters.
  """
  path = folder / STATE
  if object_stores.scheme(path) == 's3':
    orbax_on_s3.enable()
  try:
    with ocp.PyTreeCheckpointer() as checkpointer:
      tree = checkpointer.metadata(path).item_metadata.tree
      step = tree['state']['step']
      wanted = {'target': tree['target'], 'state': {'step': step}}
      found = checkpointer.restore(
        path,
        args=ocp.args.PyTreeRestore(
          item=wanted,
          restore_args=jax.tree.map(
            lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted
          ),
          partial_restore=True,
        ),
      )
  except KeyError as error:
    raise errors.UserError(f'{path} holds no {error}') from error
  except Exception as error:  # TensorStore's, Orbax's, JSON's.
    raise errors.UserError(
      f'{path} is damaged: {errors.first_line(error)}'
    ) from error
  return found['target'], int(found['state']['step'])
