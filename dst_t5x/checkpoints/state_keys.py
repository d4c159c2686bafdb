"""What the arrays of a training state are called in a checkpoint.

    optimizer.PATH.K   the K-th array that the optimizer keeps of a parameter;
                       PATH has dots: `decoder.logits_dense.kernel`
    optimizer.K        its K-th array that is no parameter's, such as a count
    projection.PATH    of the projection's state, by its own names
    NAME               anything else, by the name of its field

K counts from 0, in the order of the tree. Optax's names of fields, and how it
nests its states, are not part of a key: another release of Optax may rename a
field, or put one transformation more around another. It may not change which
arrays there are, or the order of a parameter's.
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
    state: name -> tree of any containers; `optimizer` is the optimizer's.
    params: what is trained, or its shapes.
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
  """Inverse of `flatten`, for a state of the structure of `like`."""
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
    # The longest: one parameter's path may end as another's.
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
