"""The parameters of a checkpoint that T5X wrote through Orbax, its default now.

A folder `checkpoint_<step>` holds `state`, an Orbax tree of `target` and of the
optimizer's `state`, and `dataset`, the position in the data.
"""

import math
from typing import Any

from etils import epath
import jax
import numpy as np
import orbax.checkpoint as ocp

from dst_t5x.checkpoints import checkpoint_files
from dst_t5x.checkpoints import orbax_on_s3
from dst_t5x.core import errors
from dst_t5x.core import json_object
from dst_t5x.core import object_stores

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
      checkpoint_files.check_fits(
        sum(4 * math.prod(x.shape) for x in jax.tree.leaves(tree['target'])),
        folder,
      )
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
  except errors.UserError:
    raise
  except KeyError as error:
    raise errors.UserError(f'{path} holds no {error}') from error
  except Exception as error:  # TensorStore's, Orbax's, JSON's.
    raise errors.UserError(
      f'{path} is damaged: {errors.first_line(error)}'
    ) from error
  return found['target'], as_step(found['state']['step'], folder)


def as_step(stored: Any, folder: epath.Path) -> int:
  """Returns the step that a checkpoint stores.

  Raises:
    UserError: it is no whole number.
  """
  array = np.asarray(stored)
  if array.size != 1 or array.dtype.kind not in 'iu' or array.item() < 0:
    raise errors.UserError(
      f'{folder} is damaged: its step is {json_object.shown(stored)}'
    )
  return int(array.item())
