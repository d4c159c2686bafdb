"""The subset: the difference of a tuned model from its seed.

For each tensor, a subset has the positions of the components whose bits differ
from the seed's, and their values. It stores values instead of differences, so
that applying a subset to its seed gives the tuned parameters bit for bit.

Everything here runs on the host, one tensor at a time. Paths of tensors are
T5X's, in the unstacked form, even if the network has stacked layers.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np

from dst_t5x.core import tree_paths
from dst_t5x.core.errors import UserError
from dst_t5x.subsets import definition
from dst_t5x.subsets import fingerprint as fingerprint_lib
from dst_t5x.subsets.definition import Subset
from dst_t5x.subsets.definition import TensorType
from dst_t5x.subsets.definition import check_entries
from dst_t5x.subsets.definition import check_fingerprint
from dst_t5x.subsets.definition import check_tensors
from dst_t5x.subsets.dtypes import bits

# With what a subset is, which needs no JAX.
__all__ = [
  'Difference',
  'PyTree',
  'Subset',
  'apply',
  'bits',
  'check_entries',
  'check_fingerprint',
  'check_finite',
  'check_same_seed',
  'check_seed',
  'check_tensors',
  'diff',
  'entries',
  'extract',
  'like',
  'types_of',
]

PyTree = Any


def extract(
  params: PyTree, seed: PyTree, fingerprint: str | None = None
) -> Subset:
  """Returns the components of `params` whose bits differ from the seed's.

  Args:
    params: tree of arrays, stacked or not.
    seed: tree of arrays of the same network and dtypes, stacked or not.
    fingerprint: the seed's fingerprint, if known; a file needs it.

  Raises:
    UserError: the two differ in a tensor's name, shape or dtype.
  """
  tensors = types_of(seed)
  check_tensors(types_of(params), tensors, 'the tuned model', 'the seed')
  seed_tensors = dict(fingerprint_lib.tensors(seed))
  positions, values = {}, {}
  for path, tensor in fingerprint_lib.tensors(params):
    new, old = tensor.reshape(-1), seed_tensors[path].reshape(-1)
    changed = np.flatnonzero(bits(new) != bits(old))
    if len(changed):
      positions[path] = changed
      values[path] = new[changed]
  return Subset(tensors, positions, values, fingerprint)


def types_of(params: PyTree) -> dict[str, TensorType]:
  """Returns unstacked path -> shape and dtype, for a tree of arrays.

  The leaves need a shape and a dtype only. Nothing is copied to the host.
  """
  types: dict[str, TensorType] = {}
  for key_path, leaf in jax.tree_util.tree_leaves_with_path(params):
    path = tree_paths.path_of(key_path)
    stacked, paths = tree_paths.slice_paths(path, leaf.shape)
    of_slice = TensorType(leaf.shape[int(stacked) :], leaf.dtype)
    types |= dict.fromkeys(paths, of_slice)
  return types


def check_seed(
  subset: Subset, seed: PyTree, fingerprint: str | None = None
) -> None:
  """Checks that a subset belongs to a seed.

  Args:
    subset: the subset; its fingerprint is compared if it has one.
    seed: tree of arrays, stacked or not.
    fingerprint: the seed's fingerprint. None computes it, which takes as long
      as reading the parameters.

  Raises:
    UserError: the subset belongs to another seed or has other tensors.
  """
  check_tensors(types_of(seed), subset.tensors, 'the seed', 'the subset')
  if subset.fingerprint is not None:
    found = fingerprint or fingerprint_lib.fingerprint(seed)
    check_fingerprint(subset, found)


def apply(
  subset: Subset, seed: PyTree, fingerprint: str | None = None
) -> PyTree:
  """Returns the seed with the subset's values at their positions.

  Args:
    subset: positions and values.
    seed: tree of arrays, stacked or not; it is not changed.
    fingerprint: the seed's fingerprint, if known; see `check_seed`.

  Returns:
    A tree like `seed`. Tensors without a difference are the same objects; the
    others are on the host.

  Raises:
    UserError: the subset belongs to another seed or has other tensors, or its
      positions are not ascending or outside their tensors.
  """
  check_seed(subset, seed, fingerprint)
  check_entries(subset)
  leaves, tree = jax.tree_util.tree_flatten_with_path(seed)
  result = []
  for key_path, leaf in leaves:
    path = tree_paths.path_of(key_path)
    _, paths = tree_paths.slice_paths(path, leaf.shape)
    if subset.positions.keys().isdisjoint(paths):
      result.append(leaf)
      continue
    tuned = np.array(leaf, order='C')
    for path, tensor in zip(paths, tuned.reshape(len(paths), -1), strict=True):
      if path in subset.positions:
        tensor[subset.positions[path]] = subset.values[path]
    result.append(tuned)
  return jax.tree_util.tree_unflatten(tree, result)


def check_finite(subset: Subset) -> None:
  """Raises UserError if a value of a subset is not finite."""
  definition.check_finite(subset.values)


class Difference(NamedTuple):
  """The changes from one subset to another of the same seed.

  Attributes:
    removed: the entries that only the first has.
    added: the entries that only the second has.
    changed: the entries of both with different bits, with the second's values.
  """

  removed: Subset
  added: Subset
  changed: Subset


def diff(first: Subset, second: Subset) -> Difference:
  """Returns the changes from one subset to another.

  Raises:
    UserError: the subsets have different seeds.
  """
  check_same_seed(first, second)
  removed, added, changed = {}, {}, {}
  for path in sorted(first.positions.keys() | second.positions.keys()):
    a, b = entries(first, path), entries(second, path)
    _, in_a, in_b = np.intersect1d(
      a[0], b[0], assume_unique=True, return_indices=True
    )
    removed[path] = _without(a, in_a)
    added[path] = _without(b, in_b)
    differ = bits(a[1][in_a]) != bits(b[1][in_b])
    changed[path] = b[0][in_b[differ]], b[1][in_b[differ]]
  return Difference(*(like(first, e) for e in (removed, added, changed)))


def _without(
  entries: tuple[np.ndarray, np.ndarray], indices: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  return np.delete(entries[0], indices), np.delete(entries[1], indices)


def entries(subset: Subset, path: str) -> tuple[np.ndarray, np.ndarray]:
  """Returns the positions and values of a tensor; [0] if none is free."""
  if path in subset.positions:
    return subset.positions[path], subset.values[path]
  dtype = subset.tensors[path].dtype
  return np.zeros(0, np.int64), np.zeros(0, dtype)


def like(
  subset: Subset, content: Mapping[str, tuple[np.ndarray, np.ndarray]]
) -> Subset:
  """Returns a subset of the same seed from path -> (positions, values)."""
  some = {path: both for path, both in content.items() if len(both[0])}
  return dataclasses.replace(
    subset,
    positions={path: positions for path, (positions, _) in some.items()},
    values={path: values for path, (_, values) in some.items()},
  )


def check_same_seed(first: Subset, second: Subset) -> None:
  """Raises UserError if two subsets are known to have different seeds."""
  check_tensors(first.tensors, second.tensors, 'the first subset', 'the second')
  if None in (both := (first.fingerprint, second.fingerprint)):
    return
  if both[0] != both[1]:
    raise UserError(
      f'subset: they belong to different seeds, with fingerprints '
      f'{str(both[0])[:12]}… and {str(both[1])[:12]}…'
    )
