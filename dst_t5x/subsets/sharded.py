"""Subsets of parameters on the devices of several processes.

Each process compares its own shards. Processes exchange only differences.
"""

from collections.abc import Sequence
import dataclasses

import jax
import numpy as np

from dst_t5x.core import tree_paths
from dst_t5x.subsets import extraction
from dst_t5x.subsets import fingerprint as fingerprint_lib


def extract_here(
  params: extraction.PyTree,
  seed: extraction.PyTree,
  fingerprint: str | None = None,
) -> extraction.Subset:
  """Returns the differences in this process's shards.

  Only the first copy of a replicated shard is used. The subsets of all
  processes are disjoint, and their union is the result of `extract`.

  Args:
    params: tree of jax.Array, stacked or not, with some or all of the seed's
      tensors.
    seed: tree of NumPy arrays of the same network and dtypes, stacked or not,
      complete in each process.
    fingerprint: the seed's fingerprint, if known.

  Raises:
    UserError: the two differ in a tensor's name, shape or dtype.
  """
  tensors = extraction.types_of(seed)
  found = extraction.types_of(params)
  extraction.check_tensors(
    found,
    {path: tensors[path] for path in tensors.keys() & found.keys()},
    'the tuned model',
    'the seed',
  )
  seed_tensors = dict(fingerprint_lib.tensors(seed))
  parts: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
  for key_path, leaf in jax.tree_util.tree_leaves_with_path(params):
    path = tree_paths.path_of(key_path)
    stacked, paths = tree_paths.slice_paths(path, leaf.shape)
    for shard in leaf.addressable_shards:
      if shard.replica_id:
        continue
      new, index = np.asarray(shard.data), shard.index
      here, rows = paths, [new]
      if stacked:
        here, rows, index = paths[index[0]], list(new), index[1:]
      for path, part in zip(here, rows, strict=True):
        parts.setdefault(path, []).append(
          _differing(part, seed_tensors[path], index)
        )
  return _join(extraction.Subset(tensors, {}, {}, fingerprint), parts)


def merge(subsets: Sequence[extraction.Subset]) -> extraction.Subset:
  """Returns the union of disjoint subsets."""
  parts: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
  for subset in subsets:
    for path in subset.positions:
      both = subset.positions[path], subset.values[path]
      parts.setdefault(path, []).append(both)
  return _join(subsets[0], parts)


def _differing(
  new: np.ndarray, seed: np.ndarray, index: tuple[slice, ...]
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the values that differ, and their positions in the whole tensor."""
  old = np.ascontiguousarray(seed[index])
  differs = extraction.bits(new) != extraction.bits(old)
  if not new.ndim:
    return np.flatnonzero(differs), new[differs]
  local = np.nonzero(differs)
  everywhere = tuple(
    where + (axis.start or 0) for where, axis in zip(local, index, strict=True)
  )
  return np.ravel_multi_index(everywhere, seed.shape), new[local]


def _join(
  like: extraction.Subset,
  parts: dict[str, list[tuple[np.ndarray, np.ndarray]]],
) -> extraction.Subset:
  """Returns a subset from parts of each tensor, given in any order."""
  positions, values = {}, {}
  for path, stretches in parts.items():
    where = np.concatenate([w for w, _ in stretches]).astype(np.int64)
    if len(where):
      order = np.argsort(where)
      positions[path] = where[order]
      values[path] = np.concatenate([v for _, v in stretches])[order]
  return dataclasses.replace(like, positions=positions, values=values)
