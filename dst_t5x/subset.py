"""The subset: what tuning leaves behind, and all there is to store.

A subset says of each tensor which components differ from the seed's, by their
bits, and what their values are: values, not differences, so that applying a
subset to its seed gives the tuned parameters bit for bit.

Everything here runs on the host, tensor by tensor. Tensors go by T5X's paths
in the unstacked form, whatever form the network trains in.
"""

from collections.abc import Iterator, Mapping
import dataclasses
import json
import os
from typing import Any

import jax
import ml_dtypes  # noqa: F401  NumPy learns bfloat16 from it.
import numpy as np
import safetensors
import safetensors.numpy

from dst_t5x import silos
from dst_t5x.errors import UserError

PyTree = Any

FORMAT = 'dst_t5x.subset/0'


@dataclasses.dataclass(frozen=True)
class Subset:
  """Positions and values of the components that differ from a seed.

  Attributes:
    positions: path -> int64 [k], ascending, into the flattened tensor.
    values: path -> [k], the tuned values in the parameters' dtype.
  """

  positions: Mapping[str, np.ndarray]
  values: Mapping[str, np.ndarray]

  @property
  def size(self) -> int:
    """The number of free components."""
    return sum(len(p) for p in self.positions.values())


def bits(array: np.ndarray) -> np.ndarray:
  """Returns the array's bits as unsigned integers of the same width."""
  return array.view(np.dtype(f'uint{8 * array.dtype.itemsize}'))


def _slices(params: PyTree) -> Iterator[tuple[str, np.ndarray]]:
  """Yields unstacked path and tensor, on the host, one at a time."""
  for key_path, leaf in jax.tree_util.tree_leaves_with_path(params):
    path = silos.path_of(key_path)
    array = np.asarray(leaf)
    stacked, paths = silos.slice_paths(path, array.shape)
    yield from zip(paths, array if stacked else [array], strict=True)


def extract(params: PyTree, seed: PyTree) -> Subset:
  """Returns the components of `params` whose bits differ from the seed's.

  Args:
    params: tree of arrays, stacked or not.
    seed: tree of arrays of the same network and dtypes, stacked or not.
  """
  positions, values = {}, {}
  seed_tensors = dict(_slices(seed))
  for path, new in _slices(params):
    new = np.ascontiguousarray(new)
    old = np.ascontiguousarray(seed_tensors[path])
    changed = np.flatnonzero(bits(new.reshape(-1)) != bits(old.reshape(-1)))
    if len(changed):
      positions[path] = changed
      values[path] = new.reshape(-1)[changed]
  return Subset(positions, values)


def apply(subset: Subset, seed: PyTree) -> PyTree:
  """Returns a copy of the seed with the subset's values in their places.

  Args:
    subset: positions and values.
    seed: unstacked tree of host arrays; it is not changed.

  Raises:
    UserError: a tensor that the seed lacks, another dtype, or a position
      outside of the tensor.
  """
  leaves, tree = jax.tree_util.tree_flatten_with_path(seed)
  left = set(subset.positions)
  result = []
  for key_path, leaf in leaves:
    path = silos.path_of(key_path)
    if path not in left:
      result.append(leaf)
      continue
    left.discard(path)
    where, values = subset.positions[path], subset.values[path]
    if values.dtype != leaf.dtype:
      raise UserError(
          f'subset: {path} is {values.dtype}, the seed has {leaf.dtype}'
      )
    if len(where) and not 0 <= where.min() <= where.max() < leaf.size:
      raise UserError(f'subset: a position of {path} is outside of the tensor')
    tuned = np.array(leaf, copy=True).reshape(-1)
    tuned[where] = values
    result.append(tuned.reshape(leaf.shape))
  if left:
    raise UserError(f'subset: the seed has no tensor {sorted(left)[0]}')
  return jax.tree_util.tree_unflatten(tree, result)


def to_arrays(subset: Subset) -> dict[str, np.ndarray]:
  """Returns the subset as a few flat arrays: few large ones store best."""
  paths = sorted(subset.positions)
  counts = np.array([len(subset.positions[p]) for p in paths], np.int64)
  none = np.zeros(0, np.int64)
  return {
      'paths': np.frombuffer('\n'.join(paths).encode(), np.uint8),
      'counts': counts,
      'positions': np.concatenate([none, *(subset.positions[p] for p in paths)]),
      'values': (
          np.concatenate([subset.values[p] for p in paths])
          if paths
          else np.zeros(0, np.float32)
      ),
  }


def from_arrays(arrays: Mapping[str, np.ndarray]) -> Subset:
  """Inverse of `to_arrays`.

  Raises:
    UserError: lengths that contradict each other.
  """
  text = bytes(np.asarray(arrays['paths'], np.uint8)).decode()
  paths = text.split('\n') if text else []
  counts = np.asarray(arrays['counts'])
  positions, values = arrays['positions'], arrays['values']
  if not len(paths) == len(counts) or not (
      counts.sum() == len(positions) == len(values)
  ):
    raise UserError('subset: its lengths contradict each other')
  ends = np.cumsum(counts)[:-1]
  return Subset(
      dict(zip(paths, np.split(np.asarray(positions), ends), strict=False)),
      dict(zip(paths, np.split(np.asarray(values), ends), strict=False)),
  )


def save(path: str | os.PathLike[str], subset: Subset, about: Mapping) -> int:
  """Writes a subset file, whole or not at all; returns its bytes.

  The file is in the safetensors format: `positions` (int32 where they fit)
  and `values`, one after the other for all tensors, and in the metadata what
  the subset belongs to.

  Args:
    path: where to; an older file is replaced.
    subset: what to write.
    about: what else a reader should know: the seed's fingerprint, ε, ….
  """
  arrays = to_arrays(subset)
  if not len(arrays['positions']) or arrays['positions'].max() < 2**31:
    arrays['positions'] = arrays['positions'].astype(np.int32)
  metadata = {'format': FORMAT, 'about': json.dumps(dict(about), default=str)}
  blob = safetensors.numpy.save(arrays, metadata)
  part = f'{os.fspath(path)}.part'
  with open(part, 'wb') as f:
    f.write(blob)
    f.flush()
    os.fsync(f.fileno())
  os.replace(part, path)
  return len(blob)


def load(path: str | os.PathLike[str]) -> tuple[Subset, dict[str, Any]]:
  """Reads a subset file.

  Returns:
    The subset, and what `save` was told about it.

  Raises:
    UserError: no such file, or not a subset file.
  """
  try:
    with safetensors.safe_open(path, 'numpy') as f:
      metadata = f.metadata() or {}
      arrays = {name: f.get_tensor(name) for name in f.keys()}
  except (OSError, safetensors.SafetensorError) as e:
    raise UserError(f'cannot read the subset file {path}: {e}') from e
  if metadata.get('format') != FORMAT:
    raise UserError(f'{path} is not a subset file of format {FORMAT}')
  return from_arrays(arrays), json.loads(metadata['about'])
