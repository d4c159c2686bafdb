"""Paths of parameters: how tensors, layers and stacked layers are named.

A path is T5X's: `stack/layers_3/attention/query/kernel`. Where layers are
stacked on axis 0, the same tensor is slice 3 of
`stack/layers/attention/query/kernel`. `parts` splits and joins trees by their
paths, `stacking` stacks layers and takes them apart.
"""

from collections.abc import Sequence
import re
from typing import Any

# The module whose parameters have the layer as axis 0.
STACK = 'layers'
_LAYER = re.compile(rf'{STACK}_(\d+)')


def path_of(key_path: Sequence[Any]) -> str:
  """Returns a JAX key path as `layers_0/mlp/wi_0/kernel`."""
  import jax  # PyTorch's reader of subsets does without.

  return jax.tree_util.keystr(tuple(key_path), simple=True, separator='/')


def layer(number: int) -> str:
  """Returns the name of a layer's module."""
  return f'{STACK}_{number}'


def is_layer(name: str) -> bool:
  """Returns whether a module of this name is a layer."""
  return bool(_LAYER.fullmatch(name))


def stacked_path(path: str) -> tuple[str, str] | None:
  """Returns where a layer's tensor is in a stack, and the layer's number.

  Returns:
    `layers/mlp/wo/kernel` and '3' for `layers_3/mlp/wo/kernel`; None for a
    tensor that is in no layer.
  """
  names = path.split('/')
  for i, name in enumerate(names[:-1]):
    if match := _LAYER.fullmatch(name):
      return '/'.join([*names[:i], STACK, *names[i + 1 :]]), match[1]
  return None


def is_stacked(path: str, shape: tuple[int, ...]) -> bool:
  """Returns whether axis 0 of a tensor is that of the layers."""
  return STACK in path.split('/')[:-1] and bool(shape)


def slice_paths(path: str, shape: tuple[int, ...]) -> tuple[bool, list[str]]:
  """Returns whether a tensor is stacked, and the paths of its slices."""
  if not is_stacked(path, shape):
    return False, [path]
  names = path.split('/')
  i = names.index(STACK)
  return True, [
    '/'.join([*names[:i], layer(number), *names[i + 1 :]])
    for number in range(shape[0])
  ]
