"""The subset: the difference of a tuned model from its seed.

For each tensor, a subset has the positions of the components whose bits differ
from the seed's, and their values. It stores values instead of differences, so
that applying a subset to its seed gives the tuned parameters bit for bit.

Everything here runs on the host, one tensor at a time. Paths of tensors are
T5X's, in the unstacked form, even if the network has stacked layers.
"""

from collections.abc import Mapping
import dataclasses
import math
from typing import Any, NamedTuple

import jax
import numpy as np

from dst_t5x.core import tree_paths
from dst_t5x.core.errors import UserError, nearest
from dst_t5x.subsets import fingerprint as fingerprint_lib
from dst_t5x.subsets import table

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Subset:
  """Positions and values of the components that differ from a seed.

  Attributes:
    tensors: path -> shape and dtype, of all tensors of the seed.
    positions: path -> int64 [k], ascending, into the flattened tensor; only
      for tensors with a difference.
    values: path -> [k], the tuned values in the tensor's dtype.
    fingerprint: the seed's fingerprint; None if unknown.
  """

  tensors: Mapping[str, jax.ShapeDtypeStruct]
  positions: Mapping[str, np.ndarray]
  values: Mapping[str, np.ndarray]
  fingerprint: str | None = None

  @property
  def size(self) -> int:
    """The number of free components."""
    return sum(len(p) for p in self.positions.values())


def bits(array: np.ndarray) -> np.ndarray:
  """Returns the array's bits as unsigned integers of the same width."""
  return array.view(np.dtype(f'uint{8 * array.dtype.itemsize}'))


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


def types_of(params: PyTree) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns unstacked path -> shape and dtype, for a tree of arrays.

  The leaves need a shape and a dtype only. Nothing is copied to the host.
  """
  types: dict[str, jax.ShapeDtypeStruct] = {}
  for key_path, leaf in jax.tree_util.tree_leaves_with_path(params):
    path = tree_paths.path_of(key_path)
    stacked, paths = tree_paths.slice_paths(path, leaf.shape)
    of_slice = jax.ShapeDtypeStruct(leaf.shape[int(stacked) :], leaf.dtype)
    types |= dict.fromkeys(paths, of_slice)
  return types


def check_tensors(
  found: table.Tensors, wanted: table.Tensors, what: str, whose: str
) -> None:
  """Raises UserError unless both have the same tensors; names the first one."""
  if found == wanted:
    return
  if lacking := sorted(wanted.keys() - found.keys()):
    raise UserError(
      f'subset: {whose} has a tensor {lacking[0]}, {what} has none'
      f'{nearest(lacking[0], found)}'
    )
  if extra := sorted(found.keys() - wanted.keys()):
    raise UserError(
      f'subset: {what} has a tensor {extra[0]}, {whose} has none'
      f'{nearest(extra[0], wanted)}'
    )
  path = min(path for path in wanted if found[path] != wanted[path])
  raise UserError(
    f'subset: {path} is {_text(found[path])} in {what}, {_text(wanted[path])} '
    f'in {whose}'
  )


def _text(tensor: jax.ShapeDtypeStruct) -> str:
  return f'{np.dtype(tensor.dtype).name}{[*tensor.shape]}'


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


def check_fingerprint(subset: Subset, fingerprint: str) -> None:
  """Raises UserError if a subset is known to belong to another seed."""
  if subset.fingerprint not in (None, fingerprint):
    raise UserError(
      'subset: it belongs to the seed with fingerprint '
      f'{str(subset.fingerprint)[:12]}…; this one has {fingerprint[:12]}…'
    )


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


def check_entries(subset: Subset) -> None:
  """Raises UserError unless positions and values fit their tensors."""
  for path, positions in subset.positions.items():
    values, tensor = subset.values.get(path), subset.tensors.get(path)
    if tensor is None:
      raise UserError(f'subset: it has no tensor {path}')
    if values is None or values.shape != positions.shape:
      raise UserError(f'subset: {path} has not one value for each position')
    if values.dtype != tensor.dtype:
      raise UserError(
        f'subset: the values of {path} are {values.dtype}, the tensor is '
        f'{np.dtype(tensor.dtype).name}'
      )
  paths = [path for path, found in subset.positions.items() if len(found)]
  if not paths:
    return
  # Checks all tensors at once, because there are hundreds.
  ends = np.cumsum([len(subset.positions[path]) for path in paths])
  everywhere = np.concatenate([subset.positions[path] for path in paths])
  first, last = everywhere[[0, *ends[:-1]]], everywhere[ends - 1]
  sizes = [math.prod(subset.tensors[path].shape) for path in paths]
  for i in np.flatnonzero((first < 0) | (last >= sizes)):
    raise UserError(
      f'subset: a position of {paths[i]} is outside of the tensor, which has '
      f'{sizes[i]} components'
    )
  falls = np.flatnonzero(everywhere[1:] <= everywhere[:-1])
  for fall in np.setdiff1d(falls, ends[:-1] - 1, assume_unique=True):
    path = paths[np.searchsorted(ends, fall, side='right')]
    raise UserError(f'subset: the positions of {path} are not ascending')


def check_finite(subset: Subset) -> None:
  """Raises UserError if a value of a subset is not finite."""
  for path, values in subset.values.items():
    if not np.isfinite(values).all():
      raise UserError(f'subset: a value of {path} is not finite')


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
