"""The parameters that a method trains, and the others, which stay frozen.

Both are nested dicts, of which the network's parameters are the union.
"""

from collections.abc import Iterable, Mapping
import re
from typing import Any

from dst_t5x.core.errors import UserError, nearest

PyTree = Any


def flatten(tree: PyTree) -> dict[str, Any]:
  """Returns path -> leaf."""
  from flax import traverse_util  # Not at the top: reports need no Flax.

  return traverse_util.flatten_dict(tree, sep='/')


def unflatten(flat: Mapping[str, Any]) -> PyTree:
  """Returns the nested dicts of path -> leaf."""
  from flax import traverse_util

  return traverse_util.unflatten_dict(dict(flat), sep='/')


def split(tree: PyTree, trained: Iterable[str]) -> tuple[PyTree, PyTree]:
  """Returns what is trained, and what is frozen.

  Args:
    tree: parameters, or what goes with them.
    trained: regular expressions; a path that fully matches one is trained.

  Raises:
    UserError: an expression matches nothing, or makes no sense.
  """
  flat = flatten(tree)
  chosen: set[str] = set()
  for pattern in trained:
    try:
      found = {path for path in flat if re.fullmatch(pattern, path)}
    except (re.error, TypeError) as e:
      raise UserError(f'trained: no regular expression {pattern!r}: {e}') from e
    if not found:
      raise UserError(
        f'trained: no parameter matches {pattern!r}{nearest(pattern, flat)}'
      )
    chosen |= found
  return (
    unflatten({path: leaf for path, leaf in flat.items() if path in chosen}),
    unflatten({p: leaf for p, leaf in flat.items() if p not in chosen}),
  )


def join(a: PyTree, b: PyTree) -> PyTree:
  """Returns the union of two trees; where both have a leaf, that of `b`."""
  if not b:
    return a
  return unflatten(flatten(a) | flatten(b))


def select(tree: PyTree, like: PyTree) -> PyTree:
  """Returns those leaves of a tree whose paths `like` has."""
  flat = flatten(tree)
  return unflatten({path: flat[path] for path in flatten(like)})
