"""Hugging Face's `google/t5-v1_1-*` folders, read and written without torch.

A folder holds config.json and model.safetensors, or several files that
model.safetensors.index.json lists.
"""

from collections.abc import Iterable, Mapping
import json
from typing import Any

from absl import logging
from etils import epath
from flax import traverse_util
import numpy as np
from safetensors import numpy as safetensors_numpy

from dst_t5x import checkpoint_files
from dst_t5x import errors
from dst_t5x import hf_names
from dst_t5x import network
from dst_t5x import safetensors_files

_CONFIG = 'config.json'
_WEIGHTS = 'model.safetensors'
_SHARDS = 'model.safetensors.index.json'
_PICKLE = 'pytorch_model.bin'
_LARGEST_SHARD_BYTES = 5 * 10**9

# The one T5 that T5X's network is; what it does not say itself is fixed there.
_FIXED = {
  'model_type': 't5',
  'feed_forward_proj': 'gated-gelu',
  'relative_attention_max_distance': 128,
  'layer_norm_epsilon': 1e-6,
}
# Some files hold the shared table once more for each stack.
_DUPLICATES = ('encoder.embed_tokens.weight', 'decoder.embed_tokens.weight')
# Left over from T5 1.0 in old files; transformers ignores it by name as well.
_UNUSED = (
  'decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight'
)


def is_checkpoint(path: epath.PathLike) -> bool:
  """Whether a folder looks like one of Hugging Face's."""
  names = (_CONFIG, _WEIGHTS, _SHARDS, _PICKLE)
  return any((epath.Path(path) / name).exists() for name in names)


def config_of(path: epath.PathLike) -> network.T5Config:
  """Returns the sizes that a folder's config.json states.

  Raises:
    UserError: it is missing, damaged, or of another kind than T5 1.1.
  """
  return _config(_read_config(epath.Path(path)))


def load(path: epath.PathLike) -> checkpoint_files.LoadedCheckpoint:
  """Reads the parameters of a Hugging Face T5 1.1 folder; its step is 0.

  Args:
    path: a folder, which may be in an object store.

  Raises:
    UserError: a file is missing or damaged, the model is of another kind, or a
      tensor is missing, superfluous or misshapen.
  """
  folder = epath.Path(path)
  stated = _read_config(folder)
  layout = hf_names.layout(
    _config(stated), stated['relative_attention_num_buckets']
  )
  tensors = _read_tensors(folder)
  if hf_names.HEAD not in tensors and stated['tie_word_embeddings']:
    # Transformers 5 states this for every T5 and leaves the head out where it
    # is the embedding itself.
    logging.info('%s: %s is %s', folder, hf_names.HEAD, hf_names.EMBEDDING)
    tensors[hf_names.HEAD] = tensors.get(hf_names.EMBEDDING)
  _check_names(folder, layout, tensors)
  params = {}
  for name, tensor in layout.items():
    array = tensors[name]
    if array.shape != tensor.shape:
      raise errors.UserError(
        f'{folder}: tensor {name} is {array.shape}, its {_CONFIG} asks for'
        f' {tensor.shape}'
      )
    array = checkpoint_files.to_float32(array, f'{name} of {folder}')
    # A copy also where nothing changes: the file is only mapped.
    params[tensor.path] = np.array(
      array.T if tensor.transposed else array, order='C'
    )
  return checkpoint_files.LoadedCheckpoint(
    params=traverse_util.unflatten_dict(params, sep='/'), step=0
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
  stated = _stated(config, num_buckets=relative.shape[-1])
  layout = hf_names.layout(_config(stated), relative.shape[-1])
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
      (folder / _SHARDS).write_text(json.dumps(index, indent=2) + '\n')
    # Last: without it the folder is no checkpoint.
    (folder / _CONFIG).write_text(json.dumps(stated, indent=2) + '\n')


def _read_config(folder: epath.Path) -> dict[str, Any]:
  """Returns config.json with its defaults; refuses what is not T5 1.1."""
  stated = checkpoint_files.read_json(folder / _CONFIG)
  defaults = {
    'relative_attention_num_buckets': 32,
    'relative_attention_max_distance': 128,
    'layer_norm_epsilon': 1e-6,
    'dropout_rate': 0.1,
    'tie_word_embeddings': True,
    'num_decoder_layers': None,
    'feed_forward_proj': 'relu',
  }
  stated = {**defaults, **stated}
  for key, value in _FIXED.items():
    if stated.get(key) != value:
      raise errors.UserError(
        f'{folder} is no T5 1.1 model: its {_CONFIG} has {key}'
        f' {stated.get(key)!r}, not {value!r}'
      )
  # Transformers 5 states tied embeddings for every T5; only this tells.
  if stated.get('scale_decoder_outputs', stated['tie_word_embeddings']):
    raise errors.UserError(
      f'{folder} is no T5 1.1 model: its {_CONFIG} ties the output projection'
      ' to the embeddings (T5 1.0); take a google/t5-v1_1 model'
    )
  return stated


def _config(stated: Mapping[str, Any]) -> network.T5Config:
  """Translates config.json."""
  try:
    return network.T5Config(
      vocab_size=stated['vocab_size'],
      emb_dim=stated['d_model'],
      num_heads=stated['num_heads'],
      num_encoder_layers=stated['num_layers'],
      num_decoder_layers=stated['num_decoder_layers'] or stated['num_layers'],
      head_dim=stated['d_kv'],
      mlp_dim=stated['d_ff'],
      mlp_activations=('gelu', 'linear'),
      dropout_rate=stated['dropout_rate'],
      logits_via_embedding=False,
    )
  except KeyError as error:
    raise errors.UserError(f'{_CONFIG} lacks {error}') from error


def _stated(config: network.T5Config, num_buckets: int) -> dict[str, Any]:
  """Returns the config.json of a network."""
  if tuple(config.mlp_activations) != ('gelu', 'linear'):
    raise errors.UserError(
      f'no T5 1.1 model: mlp_activations {tuple(config.mlp_activations)}'
    )
  if config.logits_via_embedding:
    raise errors.UserError('no T5 1.1 model: logits_via_embedding is set')
  return {
    **_FIXED,
    'architectures': ['T5ForConditionalGeneration'],
    'd_ff': config.mlp_dim,
    'd_kv': config.head_dim,
    'd_model': config.emb_dim,
    'decoder_start_token_id': 0,
    'dropout_rate': config.dropout_rate,
    'eos_token_id': 1,
    'initializer_factor': 1.0,
    'is_encoder_decoder': True,
    'num_decoder_layers': config.num_decoder_layers,
    'num_heads': config.num_heads,
    'num_layers': config.num_encoder_layers,
    'pad_token_id': 0,
    'relative_attention_num_buckets': num_buckets,
    'tie_word_embeddings': False,
    'torch_dtype': 'float32',
    'use_cache': True,
    'vocab_size': config.vocab_size,
  }


def _read_tensors(folder: epath.Path) -> dict[str, Any]:
  """Returns the tensors of all files of a folder."""
  if (folder / _SHARDS).exists():
    index = checkpoint_files.read_json(folder / _SHARDS)
    weight_map = index.get('weight_map')
    if not isinstance(weight_map, dict):
      raise errors.UserError(f'{folder / _SHARDS} has no weight_map')
    files = sorted(set(weight_map.values()))
  elif (folder / _WEIGHTS).exists():
    files = [_WEIGHTS]
  elif (folder / _PICKLE).exists():
    raise errors.UserError(
      f'{folder} has only {_PICKLE}, a pickle, which is not read: get its'
      f' {_WEIGHTS}, or write it with transformers:'
      ' T5ForConditionalGeneration.from_pretrained(folder)'
      '.save_pretrained(new_folder)'
    )
  else:
    raise errors.UserError(f'{folder} has no {_WEIGHTS}')
  tensors: dict[str, Any] = {}
  for file in files:
    tensors.update(safetensors_files.read(folder / file))
  return tensors


def _check_names(
  folder: epath.Path, layout: Iterable[str], tensors: dict[str, Any]
) -> None:
  """Refuses missing and superfluous tensors; takes out known duplicates."""
  missing = sorted(set(layout) - set(tensors))
  if missing:
    raise errors.UserError(
      f'{folder} lacks tensor {missing[0]} ({len(missing)} missing)'
    )
  table = tensors[hf_names.EMBEDDING]
  for name in _DUPLICATES:
    if not np.array_equal(tensors.pop(name, table), table):
      raise errors.UserError(
        f'{folder}: tensor {name} differs from {hf_names.EMBEDDING}'
      )
  extra = sorted(set(tensors) - set(layout) - {_UNUSED})
  if extra:
    raise errors.UserError(
      f'{folder} has a tensor that T5 1.1 of this size has not: {extra[0]}'
      f' ({len(extra)} superfluous)'
    )


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
