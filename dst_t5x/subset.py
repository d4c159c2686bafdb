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

from etils import epath
import jax
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from dst_t5x import silos
from dst_t5x.errors import UserError

PyTree = Any

FORMAT = 'dst_t5x.subset/0'
# All metadata go under one key: safetensors writes several in random order,
# and equal subsets should give equal files.
_METADATA = 'subset'
# The library's NumPy reader knows no bfloat16.
_DTYPES = {
  'BF16': np.dtype(ml_dtypes.bfloat16),
  'F16': np.dtype('<f2'),
  'F32': np.dtype('<f4'),
  'I32': np.dtype('<i4'),
  'I64': np.dtype('<i8'),
  'U8': np.dtype('u1'),
}


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

  Raises:
    UserError: a tensor that the seed lacks or has in another shape or dtype.
  """
  positions, values = {}, {}
  seed_tensors = dict(_slices(seed))
  for path, new in _slices(params):
    old = seed_tensors.get(path)
    if old is None or (new.shape, new.dtype) != (old.shape, old.dtype):
      has = 'lacks it' if old is None else f'has {old.dtype}{[*old.shape]}'
      raise UserError(
        f'subset: {path} is {new.dtype}{[*new.shape]}, the seed {has}'
      )
    new, old = new.reshape(-1), old.reshape(-1)
    changed = np.flatnonzero(bits(new) != bits(old))
    if len(changed):
      positions[path] = changed
      values[path] = new[changed]
  return Subset(positions, values)


def apply(subset: Subset, seed: PyTree) -> PyTree:
  """Returns the seed with the subset's values in their places.

  Args:
    subset: positions and values.
    seed: tree of arrays, stacked or not; it is not changed.

  Returns:
    A tree like `seed`; tensors that the subset does not touch are the same
    objects, the others are on the host.

  Raises:
    UserError: a tensor that the seed lacks, another dtype, or positions that
      are not ascending or not inside of the tensor.
  """
  leaves, tree = jax.tree_util.tree_flatten_with_path(seed)
  left = set(subset.positions)
  result = []
  for key_path, leaf in leaves:
    _, paths = silos.slice_paths(silos.path_of(key_path), leaf.shape)
    if left.isdisjoint(paths):
      result.append(leaf)
      continue
    tuned = np.array(leaf, order='C')
    for path, tensor in zip(paths, tuned.reshape(len(paths), -1), strict=True):
      if path in left:
        left.discard(path)
        _put(tensor, path, subset.positions[path], subset.values[path])
    result.append(tuned)
  if left:
    raise UserError(f'subset: the seed has no tensor {min(left)}')
  return jax.tree_util.tree_unflatten(tree, result)


def _put(
  tensor: np.ndarray, path: str, positions: np.ndarray, values: np.ndarray
) -> None:
  """Writes values into a flat tensor.

  Raises:
    UserError: they do not fit into it.
  """
  if values.dtype != tensor.dtype:
    raise UserError(
      f'subset: {path} is {values.dtype}, the seed has {tensor.dtype}'
    )
  if positions.shape != values.shape:
    raise UserError(f'subset: {path} has not one value for each position')
  if (np.diff(positions) <= 0).any():
    raise UserError(f'subset: the positions of {path} are not ascending')
  if len(positions) and not 0 <= positions[0] <= positions[-1] < tensor.size:
    raise UserError(
      f'subset: a position of {path} is outside of the tensor, which has '
      f'{tensor.size} components'
    )
  tensor[positions] = values


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
    UserError: an array is missing, or they contradict each other.
  """
  try:
    names = ('paths', 'counts', 'positions', 'values')
    paths, counts, positions, values = (np.asarray(arrays[n]) for n in names)
    text = paths.astype(np.uint8).tobytes().decode()
  except (KeyError, UnicodeDecodeError) as e:
    raise UserError(f'subset: it is damaged: {e!r}') from e
  tensors = text.split('\n') if text else []
  if (
    not len(set(tensors)) == len(tensors) == len(counts)
    or (counts < 0).any()
    or not counts.sum() == len(positions) == len(values)
  ):
    raise UserError('subset: its lengths contradict each other')
  # The part after the last end is empty.
  ends = np.cumsum(counts)
  where = np.split(positions.astype(np.int64), ends)[:-1]
  what = np.split(values, ends)[:-1]
  return Subset(
    dict(zip(tensors, where, strict=True)),
    dict(zip(tensors, what, strict=True)),
  )


def save(path: str | os.PathLike[str], subset: Subset, about: Mapping) -> int:
  """Writes a subset file, whole or not at all; returns its bytes.

  The file is in the safetensors format: `positions` (int32 where they fit)
  and `values`, one after the other for all tensors, `paths` and `counts` to
  tell them apart, and in the metadata what the subset belongs to.

  Args:
    path: where to; an older file is replaced.
    subset: what to write.
    about: what else a reader should know: the seed's fingerprint, ε, ….

  Raises:
    UserError: the file cannot be written.
  """
  arrays = to_arrays(subset)
  if not len(arrays['positions']) or arrays['positions'].max() < 2**31:
    arrays['positions'] = arrays['positions'].astype(np.int32)
  metadata = json.dumps(
    {'format': FORMAT, 'about': dict(about)}, default=str, sort_keys=True
  )
  blob = safetensors.numpy.save(arrays, {_METADATA: metadata})
  target = epath.Path(path)
  part = target.with_name(f'{target.name}.part')
  try:
    with part.open('wb') as f:
      f.write(blob)
      f.flush()
      # Else a crash of the machine may leave an empty file under the name.
      if '://' not in os.fspath(target):
        os.fsync(f.fileno())
    part.replace(target)
  except OSError as e:
    part.unlink(missing_ok=True)
    raise UserError(f'cannot write the subset file {target}: {e}') from e
  return len(blob)


def load(path: str | os.PathLike[str]) -> tuple[Subset, dict[str, Any]]:
  """Reads a subset file.

  Returns:
    The subset, and what `save` was told about it.

  Raises:
    UserError: no such file, or not a whole subset file.
  """
  try:
    blob = epath.Path(path).read_bytes()
    tensors = dict(safetensors.deserialize(blob))
  except (OSError, safetensors.SafetensorError) as e:
    raise UserError(f'cannot read the subset file {path}: {e}') from e
  try:
    header = json.loads(blob[8 : 8 + int.from_bytes(blob[:8], 'little')])
    metadata = json.loads(header['__metadata__'][_METADATA])
    is_subset = metadata['format'] == FORMAT
  except (KeyError, TypeError, ValueError):
    is_subset = False
  if not is_subset:
    raise UserError(f'{path} is not a subset file of format {FORMAT}')
  arrays = {
    name: np.frombuffer(tensor['data'], _DTYPES[tensor['dtype']])
    for name, tensor in tensors.items()
  }
  return from_arrays(arrays), metadata['about']
