"""Reads and writes the format of the public T5X checkpoints, without T5X.

A checkpoint is a folder `checkpoint_<step>`. Its file `checkpoint`, the index,
is Flax's msgpack of
`{'version': 3, 'optimizer': {'target': …, 'state': {'step': …}}}`. A leaf of
`target` is an array, or the TensorStore spec of a zarr folder beside the index,
`target.stack.layers_0.…`. A spec has an absolute path, of which only the
folder's name is used here, so that checkpoints can be moved.

`t5x_orbax` reads T5X's Orbax format.
"""

from collections.abc import Iterator, Mapping
from concurrent import futures
import contextlib
import itertools
import math
import re
from typing import Any

from absl import logging
from etils import epath
from flax import serialization
from flax import traverse_util
import msgpack
import numpy as np
import tensorstore

from dst_t5x.checkpoints import checkpoint_files
from dst_t5x.checkpoints import t5x_orbax
from dst_t5x.core import errors
from dst_t5x.core import json_object
from dst_t5x.core import object_stores
from dst_t5x.core import parts
from dst_t5x.core import stacking

_INDEX = 'checkpoint'
_VERSION = 3
# As in T5X: small enough for many hosts to read slices.
_CHUNK_BYTES = 64 * 2**20
# Enough to hide the latency of a bucket.
_CONCURRENT_READS = 32
# The errors that msgpack and Flax raise for damaged bytes.
_DAMAGED = (
  OSError,
  RecursionError,
  IndexError,
  OverflowError,
  ValueError,
  TypeError,
  KeyError,
  AttributeError,
  AssertionError,
  msgpack.UnpackException,
)


def steps(folder: epath.PathLike) -> list[int]:
  """Returns the steps of folders `checkpoint_<step>`, ascending.

  Some may be incomplete: T5X writes the index last.
  """
  names = (child.name for child in epath.Path(folder).iterdir())
  matches = (re.fullmatch(r'checkpoint_([0-9]{1,18})', name) for name in names)
  return sorted({int(match[1]) for match in matches if match})


def is_checkpoint(path: epath.PathLike) -> bool:
  """Returns whether a folder is a checkpoint or holds `checkpoint_<step>`."""
  path = epath.Path(path)
  return path.is_dir() and (_is_whole(path) or bool(steps(path)))


def find(path: epath.PathLike) -> epath.Path:
  """Returns the folder of one whole checkpoint.

  Args:
    path: a folder `checkpoint_<step>`, or one that holds such folders. Of
      several, the newest whole one is taken and logged.

  Raises:
    UserError: there is no whole checkpoint.
  """
  folder = epath.Path(path)
  if _is_whole(folder):
    return folder
  found = steps(folder) if folder.is_dir() else []
  for step in reversed(found):
    child = folder / f'checkpoint_{step}'
    if _is_whole(child):
      logging.info('Newest whole one of %d checkpoints: %s', len(found), child)
      return child
    logging.warning('%s has no file %r: left out', child, _INDEX)
  raise errors.UserError(f'no T5X checkpoint at {folder}: no file {_INDEX!r}')


def _is_whole(folder: epath.Path) -> bool:
  return (folder / _INDEX).exists() or t5x_orbax.is_checkpoint(folder)


def load(path: epath.PathLike) -> checkpoint_files.LoadedCheckpoint:
  """Reads the parameters of a T5X checkpoint, without the optimizer's state.

  Args:
    path: a folder `checkpoint_<step>`, or one that holds such folders: the
      newest is taken. May be in an object store.

  Raises:
    UserError: there is no T5X checkpoint, or a part of it is missing, damaged
      or not a floating-point tensor.
  """
  folder = find(path)
  if t5x_orbax.is_checkpoint(folder):
    target, step = t5x_orbax.load(folder)
    arrays = parts.flatten(target)
  else:
    arrays, step = _load_native(folder)
  params = {
    name: checkpoint_files.to_float32(np.asarray(array), f'{name} of {folder}')
    for name, array in arrays.items()
  }
  return checkpoint_files.LoadedCheckpoint(
    params=stacking.unstack_layers(parts.unflatten(params)),
    step=step,
  )


def _load_native(folder: epath.Path) -> tuple[dict[str, Any], int]:
  """Returns path -> array, and the step, from T5X's own format."""
  optimizer = _read_index(folder / _INDEX)
  leaves = _flatten(optimizer['target'], folder)
  arrays = {**leaves, **_read_tensors(folder, leaves)}
  return arrays, _step(optimizer, folder)


def save(
  path: epath.PathLike, params: Mapping[str, Any], step: int
) -> epath.Path:
  """Writes float32 parameters so that T5X and `load` can read them.

  As in T5X, matrices become zarr folders and vectors stay in the index. The
  optimizer's state is not written. T5X can evaluate, infer and start
  fine-tuning from the checkpoint.

  Args:
    path: the new folder `checkpoint_<step>`, or the folder to make it in.
    params: unstacked nested dict of arrays.
    step: the training step.

  Returns:
    The checkpoint's folder.

  Raises:
    UserError: the folder exists already, is named after another step, or cannot
      be written.
  """
  folder = _new_path(epath.Path(path), step)
  flat = {
    name: checkpoint_files.to_float32(np.asarray(array), name)
    for name, array in parts.flatten(params).items()
  }
  with checkpoint_files.new_folder(folder) as temporary:
    matrices = {name: array for name, array in flat.items() if array.ndim > 1}
    leaves = {**flat, **_write_tensors(temporary, matrices)}
    content = {
      'version': _VERSION,
      'optimizer': {
        'target': parts.unflatten(leaves),
        'state': {'step': np.asarray(step, np.int32)},
      },
    }
    # The index is written last: a folder without it is not a checkpoint.
    (temporary / _INDEX).write_bytes(serialization.msgpack_serialize(content))
  return folder


def _read_index(file: epath.Path) -> dict[str, Any]:
  """Returns the index's `optimizer`, which has a `target`."""
  try:
    content = serialization.msgpack_restore(file.read_bytes())
  except _DAMAGED as error:
    raise errors.UserError(
      f'{file} is truncated or no T5X checkpoint: {errors.first_line(error)}'
    ) from error
  try:
    optimizer = content['optimizer']
    target = optimizer['target']
  except (IndexError, KeyError, TypeError):
    target = None
  if not isinstance(target, dict) or not target:
    raise errors.UserError(f'{file} holds no optimizer/target')
  return optimizer


def _flatten(target: dict[str, Any], folder: epath.Path) -> dict[str, Any]:
  """Returns path -> array or TensorStore spec.

  Raises:
    UserError: a leaf is something else.
  """
  leaves = traverse_util.flatten_dict(
    target, is_leaf=lambda _, node: _is_spec(node)
  )
  flat = {}
  for path, leaf in leaves.items():
    name = '/'.join(map(str, path))
    is_path = all(
      isinstance(key, str) and '/' not in key and key.isprintable()
      for key in path
    )
    if not is_path or not (
      _is_spec(leaf) or isinstance(leaf, np.ndarray | np.generic)
    ):
      raise errors.UserError(
        f'{folder / _INDEX} is damaged: {json_object.shown(name)} is no tensor'
      )
    flat[name] = leaf
  return flat


def _step(optimizer: Mapping[str, Any], folder: epath.Path) -> int:
  """Returns the stored step, or else the one in the folder's name."""
  state = optimizer.get('state')
  stored = state.get('step') if isinstance(state, dict) else None
  if stored is not None:
    return t5x_orbax.as_step(stored, folder)
  match = re.fullmatch(r'checkpoint_(\d+)', folder.name)
  return int(match.group(1)) if match else 0


def _is_spec(node: Any) -> bool:
  return isinstance(node, Mapping) and 'driver' in node


def _key_value_store(folder: epath.Path) -> dict[str, Any]:
  """Returns TensorStore's spec of a folder on this disk or in a bucket."""
  if object_stores.is_remote(folder):
    return object_stores.key_value_store(f'{folder}/')
  return {'driver': 'file', 'path': f'{folder.resolve()}/'}


def _folder_name(spec: Mapping[str, Any], name: str) -> str:
  """Returns the name of a tensor's folder; old specs have no `kvstore`."""
  store = spec.get('kvstore')
  path = store.get('path') if isinstance(store, Mapping) else None
  path = path or spec.get('path')
  folder = path.rstrip('/').rpartition('/')[-1] if isinstance(path, str) else ''
  is_name = folder not in ('', '.', '..') and folder.isprintable()
  if spec['driver'] != 'zarr' or not is_name:
    raise errors.UserError(
      f'tensor {name} has no zarr folder: {json_object.shown(dict(spec))}'
    )
  return folder


def _read_tensors(
  folder: epath.Path, leaves: Mapping[str, Any]
) -> dict[str, np.ndarray]:
  """Returns path -> array, for all zarr folders, read concurrently."""
  folders = {
    name: folder / _folder_name(leaf, name)
    for name, leaf in leaves.items()
    if _is_spec(leaf)
  }
  with futures.ThreadPoolExecutor(_CONCURRENT_READS) as pool:
    stores = [*pool.map(_open_tensor, folders.values())]
    checkpoint_files.check_fits(
      sum(4 * math.prod(store.shape) for store in stores), folder
    )
    arrays = pool.map(_read_tensor, stores, folders.values())
    return dict(zip(folders, arrays, strict=True))


def _open_tensor(folder: epath.Path) -> Any:
  """Opens a zarr folder, and checks that it has all chunks."""
  with _one_line(folder):
    spec = {'driver': 'zarr', 'kvstore': _key_value_store(folder)}
    store = tensorstore.open(spec, open=True).result()
    _check_chunks(store, folder)
    return store


def _read_tensor(store: Any, folder: epath.Path) -> np.ndarray:
  """Returns the array of a zarr folder."""
  with _one_line(folder):
    return store.read().result()


@contextlib.contextmanager
def _one_line(folder: epath.Path) -> Iterator[None]:
  """Turns errors of reading a tensor into UserErrors of one line."""
  try:
    yield
  except (ValueError, OSError) as error:
    raise errors.UserError(
      f'tensor {folder} is missing or damaged: {_reason(error)}'
    ) from error


def _check_chunks(store: Any, folder: epath.Path) -> None:
  """Raises UserError for a missing chunk, which zarr would read as zeros."""
  if store.fill_value is not None:
    return  # Zarr omits chunks that contain only this value.
  chunks = store.chunk_layout.read_chunk.shape
  grid = [
    range(math.ceil(size / chunk))
    for size, chunk in zip(store.shape, chunks, strict=True)
  ]
  separator = store.spec().to_json()['metadata']['dimension_separator']
  there = {key.decode() for key in store.kvstore.list().result()}
  for position in itertools.product(*grid):
    chunk = separator.join(map(str, position)) or '0'
    if chunk not in there:
      raise errors.UserError(f'tensor {folder} lacks its chunk {chunk}')


def _write_tensors(
  folder: epath.Path, arrays: Mapping[str, np.ndarray]
) -> dict[str, dict[str, Any]]:
  """Writes one zarr folder per array; returns the specs for the index."""
  writing = []
  specs = {}
  for name, array in arrays.items():
    tensor_folder = folder / f'target.{name.replace("/", ".")}'
    rows = max(1, _CHUNK_BYTES * len(array) // max(1, array.nbytes))
    metadata = {
      'shape': list(array.shape),
      'chunks': [min(rows, len(array)), *array.shape[1:]],
      'dtype': '<f4',
      'compressor': {'id': 'gzip', 'level': 1},
    }
    store = tensorstore.open(
      {
        'driver': 'zarr',
        'kvstore': _key_value_store(tensor_folder),
        'metadata': metadata,
      },
      create=True,
    ).result()
    writing.append(store.write(array))
    specs[name] = {
      'driver': 'zarr',
      'dtype': 'float32',
      'kvstore': {'driver': 'file', 'path': tensor_folder.name},
      'metadata': metadata,
    }
  try:
    for write in writing:
      write.result()
  except ValueError as error:  # TensorStore raises it if the disk is full.
    raise OSError(_reason(error)) from error
  return specs


def _reason(error: Exception) -> str:
  """Returns TensorStore's message without the spec that it appends."""
  return str(error).splitlines()[0].partition(' [tensorstore_spec')[0]


def _new_path(path: epath.Path, step: int) -> epath.Path:
  """Returns `path` if it is named after the step, else its subfolder."""
  name = f'checkpoint_{step}'
  if path.name == name:
    return path
  if re.fullmatch(r'checkpoint_\d+', path.name):
    raise errors.UserError(f'{path} is not the name of step {step}: {name}')
  return path / name
