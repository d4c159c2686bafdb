"""Conversion between layers one by one and layers stacked on axis 0.

A checkpoint names its layers `layers_0/…`; the network with `scan_layers` holds
them as `layers/…` with the layer as axis 0. See `tree_paths`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dst_t5x.core import errors
from dst_t5x.core import tree_paths

PyTree = Any


def stack_layers(params: PyTree) -> PyTree:
  """Stacks the layers `layers_0`, `layers_1`, … of every module as `layers`.

  Args:
    params: nested dicts of numpy or jax arrays; layers of `[…]`.

  Returns:
    The same with layers of `[num_layers, …]`, numpy where all layers are numpy.
    What is stacked already stays.

  Raises:
    UserError: if a layer is missing or unlike the others.
  """
  if not isinstance(params, dict):
    return params
  layers = {
    key: value for key, value in params.items() if tree_paths.is_layer(key)
  }
  others = {
    key: stack_layers(value)
    for key, value in params.items()
    if key not in layers
  }
  if not layers:
    return others
  names = [tree_paths.layer(i) for i in range(len(layers))]
  for name in names:
    if name not in layers:
      raise errors.UserError(
        f'Cannot stack {len(layers)} layers: {name} is missing.'
      )
    _check_alike(layers[names[0]], layers[name], name)
  stacked = jax.tree.map(_stack, *(layers[name] for name in names))
  return {**others, tree_paths.STACK: stacked}


def unstack_layers(params: PyTree) -> PyTree:
  """Undoes `stack_layers`: `layers` becomes `layers_0`, `layers_1` and so on.

  What is not stacked stays.
  """
  if not isinstance(params, dict):
    return params
  result = {}
  for key, value in params.items():
    if key == tree_paths.STACK:
      for i in range(len(jax.tree.leaves(value)[0])):
        result[tree_paths.layer(i)] = jax.tree.map(lambda x, i=i: x[i], value)
    else:
      result[key] = unstack_layers(value)
  return result


def _stack(*arrays: Any) -> Any:
  if all(isinstance(x, np.ndarray) for x in arrays):
    return np.stack(arrays)
  return jnp.stack(arrays)


def _check_alike(first: PyTree, other: PyTree, name: str) -> None:
  """Raises UserError unless both have the same tensors of the same shapes."""

  def shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {tree_paths.path_of(path): leaf.shape for path, leaf in leaves}

  expected, found = shapes(first), shapes(other)
  for path in sorted(expected.keys() | found.keys()):
    if expected.get(path) != found.get(path):
      raise errors.UserError(
        f'Cannot stack {name}: its {path} is {found.get(path, "missing")}, in'
        f' layers_0 it is {expected.get(path, "missing")}.'
      )
