"""The subset in which one folder of Hugging Face's differs from another."""

import numpy as np
import torch

from dst_t5x.subsets import definition
from dst_t5x.subsets.torch import folders
from dst_t5x.subsets.torch import tensors as tensors_lib

_FLOAT32 = np.dtype(np.float32)


def extract(tuned: folders.Folder, seed: folders.Folder) -> definition.Subset:
  """Returns the components of a tuned model whose bits differ from the seed's.

  Both are compared in float32, in which this package trains.

  Args:
    tuned: a folder.
    seed: a folder of the same network.

  Raises:
    UserError: a folder cannot be read, or they differ in a tensor's name or
      shape.
  """
  new, old = folders.tensors(tuned), folders.tensors(seed)
  types, tuned_types = (
    {p: definition.TensorType(t.our_shape, _FLOAT32) for p, t in side.items()}
    for side in (old, new)
  )
  definition.check_tensors(tuned_types, types, 'the tuned model', 'the seed')
  positions, values = {}, {}
  for path in sorted(types):
    where, what = _differing(new[path], old[path])
    if len(where):
      positions[path], values[path] = where, what
  return definition.Subset(types, positions, values, folders.fingerprint(seed))


def _differing(
  new: tensors_lib.Tensor, old: tensors_lib.Tensor
) -> tuple[np.ndarray, np.ndarray]:
  """Returns positions [k] and values [k] of the new components."""
  positions, values, start = [], [], 0
  both = (tensors_lib.blocks(tensor, torch.float32) for tensor in (new, old))
  for block, seed in zip(*both, strict=True):
    changed = tensors_lib.bits(block) != tensors_lib.bits(seed)
    where = torch.nonzero(changed).reshape(-1)
    positions.append(where.numpy() + start)
    values.append(block[where].numpy())
    start += len(block)
  return np.concatenate(positions), np.concatenate(values)
