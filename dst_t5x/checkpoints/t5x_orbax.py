"""Reads the parameters of T5X checkpoints in Orbax format, T5X's default now.

A folder `checkpoint_<step>` holds `state` and `dataset`. `state` is an Orbax
tree with the parameters, `target`, and the optimizer's `state`. `dataset` is
the position in the data.
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
  """Returns whether a folder `checkpoint_<step>` is in this format."""
  return (folder / STATE / '_METADATA').exists()


def load(folder: epath.Path) -> tuple[dict[str, Any], int]:
  """Returns the parameters and the step, without reading anything else.

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
  except Exception as error:  # From TensorStore, Orbax or JSON.
    raise errors.UserError(
      f'{path} is damaged: {errors.first_line(error)}'
    ) from error
  return found['target'], as_step(found['state']['step'], folder)


def as_step(stored: Any, folder: epath.Path) -> int:
  """Returns the step that a checkpoint stores, as an int.

  Raises:
    UserError: it is not a non-negative integer.
  """
  array = np.asarray(stored)
  if array.size != 1 or array.dtype.kind not in 'iu' or array.item() < 0:
    raise errors.UserError(
      f'{folder} is damaged: its step is {json_object.shown(stored)}'
    )
  return int(array.item())
