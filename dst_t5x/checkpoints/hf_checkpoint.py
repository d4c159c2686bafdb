"""Hugging Face's `google/t5-v1_1-*` folders, read and written without torch.

A folder holds config.json and model.safetensors, or several files that
model.safetensors.index.json lists.
"""

from collections.abc import Mapping
import re
from typing import Any

from absl import logging
from etils import epath
from flax import traverse_util
import numpy as np
from safetensors import numpy as safetensors_numpy

from dst_t5x.checkpoints import checkpoint_files
from dst_t5x.checkpoints import hf_config
from dst_t5x.checkpoints import safetensors_files
from dst_t5x.core import errors
from dst_t5x.core import json_object
from dst_t5x.core import json_text
from dst_t5x.models.t5 import hf_names
from dst_t5x.models.t5 import network

_WEIGHTS = 'model.safetensors'
_SHARDS = 'model.safetensors.index.json'
_PICKLE = 'pytorch_model.bin'
_LARGEST_SHARD_BYTES = 5 * 10**9

# Some files hold the shared table once more for each stack, or under one of
# these names only: `safetensors.torch.save_model` keeps the first in the
# alphabet of several names.
_COPIES = ('encoder.embed_tokens.weight', 'decoder.embed_tokens.weight')
# Left over from T5 1.0 in old files; transformers ignores it by name as well.
_UNUSED = {
  'decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight'
}


def is_checkpoint(path: epath.PathLike) -> bool:
  """Whether a folder looks like one of Hugging Face's."""
  names = (hf_config.FILE, _WEIGHTS, _SHARDS, _PICKLE)
  return any((epath.Path(path) / name).exists() for name in names)


def config_of(path: epath.PathLike) -> network.T5Config:
  """Returns the sizes that a folder's config.json states.

  Raises:
    UserError: it is missing, damaged, or of another kind than T5 1.1.
  """
  return hf_config.read(epath.Path(path)).network


def load(path: epath.PathLike) -> checkpoint_files.LoadedCheckpoint:
  """Reads the parameters of a Hugging Face T5 1.1 folder; its step is 0.

  Args:
    path: a folder, which may be in an object store.

  Raises:
    UserError: a file is missing or damaged, the model is of another kind, or a
      tensor is missing, superfluous or misshapen.
  """
  folder = epath.Path(path)
  config = hf_config.read(folder)
  layout = hf_names.layout(config.network, config.num_buckets)
  copies = dict.fromkeys(_COPIES, layout[hf_names.EMBEDDING])
  found: dict[str, np.ndarray] = {}
  for file in _files(folder):
    with safetensors_files.opened(file) as opened:
      twice = sorted(opened.names & found.keys())
      if twice:
        raise errors.UserError(
          f'{folder}: tensor {twice[0]} is in two files, {file.name} is one'
        )
      found |= _read(opened, {**layout, **copies})
  _complete(folder, found, config.head_may_be_embedding)
  missing = sorted(layout.keys() - found.keys())
  if missing:
    raise errors.UserError(
      f'{folder} lacks tensor {missing[0]} ({len(missing)} missing)'
    )
  return checkpoint_files.LoadedCheckpoint(
    params=traverse_util.unflatten_dict(
      {tensor.path: found[name] for name, tensor in layout.items()}, sep='/'
    ),
    step=0,
  )


def save(
  path: epath.PathLike,
  params: Mapping[str, Any],
  config: network.T5Config,
  largest_shard_bytes: int = _LARGEST_SHARD_BYTES,
) -> None:
  """Writes a folder for `transformers.T5ForConditionalGeneration`, float32.

  Args:
    path: the new folder.
    params: unstacked nested dict of arrays.
    config: the sizes of the network.
    largest_shard_bytes: a model above it is split into several files.

  Raises:
    UserError: the folder exists already or cannot be written, the parameters do
      not have the configured sizes, or the model is no T5 1.1.
  """
  flat = traverse_util.flatten_dict(params, sep='/')
  relative = flat.get('encoder/relpos_bias/rel_embedding', np.empty((0, 0)))
  stated = hf_config.stated(config, num_buckets=relative.shape[-1])
  layout = hf_names.layout(config, relative.shape[-1])
  _check_params(layout, flat)
  with checkpoint_files.new_folder(epath.Path(path)) as folder:
    shards = _shards(layout, largest_shard_bytes)
    weight_map = {}
    for number, names in enumerate(shards, start=1):
      file = f'model-{number:05}-of-{len(shards):05}.safetensors'
      file = file if len(shards) > 1 else _WEIGHTS
      arrays = {name: _exported(layout[name], flat) for name in names}
      content = safetensors_numpy.save(arrays, metadata={'format': 'pt'})
      (folder / file).write_bytes(content)
      weight_map.update(dict.fromkeys(names, file))
    if len(shards) > 1:
      total = sum(tensor.num_bytes for tensor in layout.values())
      index = {'metadata': {'total_size': total}, 'weight_map': weight_map}
      (folder / _SHARDS).write_text(json_text.dumps(index, indent=2) + '\n')
    # Last: without it the folder is no checkpoint.
    text = json_text.dumps(stated, indent=2) + '\n'
    (folder / hf_config.FILE).write_text(text)


def _files(folder: epath.Path) -> list[epath.Path]:
  """Returns the files of a folder that hold tensors.

  The one file goes before an index, as in Transformers: who saves a model over
  one of many files leaves the old index there.
  """
  if (folder / _WEIGHTS).exists():
    return [folder / _WEIGHTS]
  if (folder / _SHARDS).exists():
    weight_map = json_object.read(folder / _SHARDS).inner('weight_map')
    names = {weight_map.get(name, str) for name in weight_map.content}
    for name in names:
      # It names a file of this folder and nothing else, above all no bucket.
      if not re.fullmatch(r'[^/\\\0-\x1f]+\.safetensors', name):
        raise errors.UserError(
          f'{weight_map.where} names {json_object.shown(name)}, which is no'
          ' safetensors file of this folder'
        )
    return [folder / name for name in sorted(names)]
  if (folder / _PICKLE).exists():
    raise errors.UserError(
      f'{folder} has only {_PICKLE}, a pickle, which is not read: get its'
      f' {_WEIGHTS}, or write it with transformers:'
      ' T5ForConditionalGeneration.from_pretrained(folder)'
      '.save_pretrained(new_folder)'
    )
  raise errors.UserError(f'{folder} has no {_WEIGHTS}')


def _read(
  file: safetensors_files.File, known: Mapping[str, hf_names.Tensor]
) -> dict[str, np.ndarray]:
  """Returns the tensors of a file as we have them; checks all of them first."""
  names = [name for name in known if name in file.names]
  extra = sorted(file.names - _UNUSED - known.keys())
  if extra:
    raise errors.UserError(
      f'{file.path} has a tensor that T5 1.1 of this size has not: {extra[0]}'
      f' ({len(extra)} superfluous)'
      f'{safetensors_files.prefix_hint(file.names, known)}'
    )
  for name in names:
    file.check(name, known[name].shape, f'its {hf_config.FILE} asks')
  return {name: _imported(file, name, known[name]) for name in names}


def _imported(
  file: safetensors_files.File, name: str, tensor: hf_names.Tensor
) -> np.ndarray:
  """Returns a tensor as we have it, float32, a copy of its own."""
  array = checkpoint_files.to_float32(file.tensor(name), name)
  return np.ascontiguousarray(array.T if tensor.transposed else array)


def _complete(
  folder: epath.Path, found: dict[str, np.ndarray], head_may_be_embedding: bool
) -> None:
  """Gives every tensor of several names the name that the layout has.

  Raises:
    UserError: what should be one tensor is two.
  """
  same = [n for n in (hf_names.EMBEDDING, *_COPIES) if n in found]
  for name in same[1:]:
    if not np.array_equal(found[name], found[same[0]], equal_nan=True):
      raise errors.UserError(f'{folder}: tensor {name} differs from {same[0]}')
  if not same:
    return
  table = found[hf_names.EMBEDDING] = found[same[0]]
  if hf_names.HEAD not in found and head_may_be_embedding:
    # Transformers 5 states this for every T5 and leaves the head out where it
    # is the embedding itself.
    logging.info('%s: %s is %s', folder, hf_names.HEAD, hf_names.EMBEDDING)
    found[hf_names.HEAD] = np.ascontiguousarray(table.T)


def _check_params(
  layout: Mapping[str, hf_names.Tensor], flat: Mapping[str, Any]
) -> None:
  """Refuses parameters that are not the configured network's."""
  expected = {tensor.path: tensor for tensor in layout.values()}
  for path in sorted(set(expected) ^ set(flat)):
    state = 'missing' if path in expected else 'superfluous'
    raise errors.UserError(f'tensor {path} is {state} for the given config')
  for path, tensor in expected.items():
    if flat[path].shape != tensor.our_shape:
      raise errors.UserError(
        f'tensor {path} is {flat[path].shape}, the config asks for'
        f' {tensor.our_shape}'
      )


def _exported(tensor: hf_names.Tensor, flat: Mapping[str, Any]) -> np.ndarray:
  """Returns the float32 array as they store it."""
  array = checkpoint_files.to_float32(
    np.asarray(flat[tensor.path]), tensor.path
  )
  return np.ascontiguousarray(array.T if tensor.transposed else array)


def _shards(
  layout: Mapping[str, hf_names.Tensor], largest_bytes: int
) -> list[list[str]]:
  """Splits the names in order, each part as large as allowed."""
  shards: list[list[str]] = [[]]
  filled = 0
  for name, tensor in layout.items():
    if shards[-1] and filled + tensor.num_bytes > largest_bytes:
      shards.append([])
      filled = 0
    shards[-1].append(name)
    filled += tensor.num_bytes
  return shards
