"""The keys of a training state's arrays in a checkpoint.

    optimizer.PATH.K   the optimizer's K-th array for a parameter; PATH has
                       dots: `decoder.logits_dense.kernel`
    optimizer.K        the optimizer's K-th other array, such as a count
    projection.PATH    an array of the projection's state, by its field names
    NAME               any other array, by its field name

K counts from 0, in the order of the tree. Keys contain neither the field names
nor the nesting of Optax's states. A release of Optax may therefore rename a
field or wrap a transformation in another, but not add, remove or reorder a
parameter's arrays.
"""

from collections.abc import Mapping
import itertools
from typing import Any

import jax

PyTree = Any

OPTIMIZER = 'optimizer'


def flatten(state: Mapping[str, PyTree], params: PyTree) -> dict[str, Any]:
  """Returns key -> array of a training state.

  Args:
    state: name -> tree; `optimizer` is the optimizer's state.
    params: the trained parameters, or their shapes.
  """
  flat: dict[str, Any] = {}
  for name, tree in sorted(state.items()):  # As JAX orders leaves.
    if name == OPTIMIZER:
      keys = _optimizer_keys(tree, params)
    else:
      paths = jax.tree_util.tree_leaves_with_path(tree)
      keys = [_key((name, *_names(path))) for path, _ in paths]
    flat |= dict(zip(keys, jax.tree.leaves(tree), strict=True))
  return flat


def unflatten(
  like: Mapping[str, PyTree], params: PyTree, flat: Mapping[str, Any]
) -> dict[str, PyTree]:
  """Inverts `flatten`; returns a state with the structure of `like`."""
  leaves = [flat[key] for key in flatten(like, params)]
  return jax.tree.unflatten(jax.tree.structure(dict(like)), leaves)


def _optimizer_keys(state: PyTree, params: PyTree) -> list[str]:
  """Returns the keys of an optimizer's arrays, in the order of its leaves."""
  paths = {
    _names(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)
  }
  counts: dict[tuple[str, ...], itertools.count[int]] = {}
  keys = []
  for key_path, _ in jax.tree_util.tree_leaves_with_path(state):
    names = _names(key_path)
    ends = (names[start:] for start in range(len(names)))
    # The longest match: one parameter's path can be the end of another's.
    path = next((end for end in ends if end in paths), ())
    number = next(counts.setdefault(path, itertools.count()))
    keys.append(_key((OPTIMIZER, *path, str(number))))
  return keys


def _names(key_path: Any) -> tuple[str, ...]:
  return tuple(
    jax.tree_util.keystr((key,), simple=True, separator='.') for key in key_path
  )


def _key(names: tuple[str, ...]) -> str:
  return '.'.join(names)
