"""Hugging Face's folders of models, read and written without torch.

A folder holds config.json and model.safetensors, or several files that
model.safetensors.index.json lists. The model's family says what is in them, see
`models.hugging_face`.
"""

from collections.abc import Mapping
import functools
import re
from typing import Any

from absl import logging
from etils import epath
import ml_dtypes
import numpy as np
from safetensors import numpy as safetensors_numpy

from dst_t5x.checkpoints import checkpoint_files
from dst_t5x.checkpoints import safetensors_files
from dst_t5x.core import errors
from dst_t5x.core import hub
from dst_t5x.core import json_object
from dst_t5x.core import json_text
from dst_t5x.core import object_stores
from dst_t5x.core import parts
from dst_t5x.models import api
from dst_t5x.models import families
from dst_t5x.models import hugging_face

_CONFIG = 'config.json'
_WEIGHTS = 'model.safetensors'
_SHARDS = 'model.safetensors.index.json'
_PICKLE = 'pytorch_model.bin'
_LARGEST_SHARD_BYTES = 5 * 10**9


def is_checkpoint(path: epath.PathLike) -> bool:
  """Whether a folder looks like one of Hugging Face's."""
  names = (_CONFIG, _WEIGHTS, _SHARDS, _PICKLE)
  return any((epath.Path(path) / name).exists() for name in names)


def model_of(path: epath.PathLike) -> hugging_face.Model:
  """Returns what a folder's config.json states.

  Raises:
    UserError: it is missing, damaged, or of no known family.
  """
  stated = json_object.read(epath.Path(path) / _CONFIG)
  return families.of_config(stated).read(stated)


def load(path: epath.PathLike) -> checkpoint_files.LoadedCheckpoint:
  """Reads the parameters of a Hugging Face folder; its step is 0.

  Args:
    path: a folder, which may be in an object store.

  Raises:
    UserError: a file is missing or damaged, the model is of no known family, or
      a tensor is missing, superfluous or misshapen.
  """
  folder = epath.Path(path)
  model = model_of(folder)
  found: dict[str, np.ndarray] = {}
  is_bfloat16 = True
  for file in _files(folder, model):
    with safetensors_files.opened(file) as opened:
      twice = sorted(opened.names & found.keys())
      if twice:
        raise errors.UserError(
          f'{folder}: tensor {twice[0]} is in two files, {file.name} is one'
        )
      tensors = _read(opened, model)
      is_bfloat16 &= all(map(opened.is_bfloat16, tensors))
      found |= tensors
  _complete(folder, found, model)
  missing = sorted(model.tensors.keys() - found.keys())
  if missing:
    raise errors.UserError(
      f'{folder} lacks tensor {missing[0]} ({len(missing)} missing)'
    )
  return checkpoint_files.LoadedCheckpoint(
    params=parts.unflatten(
      {tensor.path: found[name] for name, tensor in model.tensors.items()}
    ),
    step=0,
    network=model.network,
    companions=functools.partial(_companions, folder),
    is_bfloat16=is_bfloat16,
  )


def save(
  path: epath.PathLike,
  params: Mapping[str, Any],
  network: api.Network,
  largest_shard_bytes: int = _LARGEST_SHARD_BYTES,
  companions: Mapping[str, bytes] | None = None,
  as_bfloat16: bool = False,
) -> None:
  """Writes a folder for Transformers' `from_pretrained`.

  Args:
    path: the new folder.
    params: unstacked nested dict of arrays.
    network: whose they are.
    largest_shard_bytes: a model above it is split into several files.
    companions: name -> content of the files that go beside the model, such as
      tokenizer.json.
    as_bfloat16: whether values are stored as bfloat16 rather than float32. They
      are not if one would be rounded.

  Raises:
    UserError: the folder exists already or cannot be written, the parameters do
      not have the network's sizes, or Hugging Face has no such model.
  """
  flat = parts.flatten(params)
  model, stated = families.of_paths(flat).written(network, params)
  layout = model.tensors
  _check_params(layout, flat)
  dtype: Any = np.float32
  if as_bfloat16 and all(map(checkpoint_files.is_bfloat16, flat.values())):
    dtype, stated = ml_dtypes.bfloat16, {**stated, 'torch_dtype': 'bfloat16'}
  with checkpoint_files.new_folder(epath.Path(path)) as folder:
    shards = _shards(layout, largest_shard_bytes)
    weight_map = {}
    for number, names in enumerate(shards, start=1):
      file = f'model-{number:05}-of-{len(shards):05}.safetensors'
      file = file if len(shards) > 1 else _WEIGHTS
      arrays = {name: _exported(layout[name], flat, dtype) for name in names}
      content = safetensors_numpy.save(arrays, metadata={'format': 'pt'})
      (folder / file).write_bytes(content)
      weight_map.update(dict.fromkeys(names, file))
    if len(shards) > 1:
      total = sum(tensor.num_bytes for tensor in layout.values())
      index = {'metadata': {'total_size': total}, 'weight_map': weight_map}
      (folder / _SHARDS).write_text(json_text.dumps(index, indent=2) + '\n')
    for name, content in (companions or {}).items():
      (folder / name).write_bytes(content)
    # Last: without it the folder is no checkpoint.
    text = json_text.dumps(stated, indent=2) + '\n'
    (folder / _CONFIG).write_text(text)


def _companions(folder: epath.Path) -> dict[str, bytes]:
  """Returns the files of a folder that belong beside its model."""
  return {
    name: object_stores.read_bytes(folder / name)
    for name in hub.COMPANIONS
    if (folder / name).exists()
  }


def _files(folder: epath.Path, model: hugging_face.Model) -> list[epath.Path]:
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
      f' {model.architecture}.from_pretrained(folder)'
      '.save_pretrained(new_folder)'
    )
  raise errors.UserError(f'{folder} has no {_WEIGHTS}')


def _read(
  file: safetensors_files.File, model: hugging_face.Model
) -> dict[str, np.ndarray]:
  """Returns the tensors of a file as we have them; checks all of them first."""
  copies = {name: model.tensors[of] for name, of in model.copies.items()}
  known = {**model.tensors, **copies}
  names = [name for name in known if name in file.names]
  extra = sorted(
    name
    for name in file.names - known.keys()
    if not model.unused.fullmatch(name)
  )
  if extra:
    raise errors.UserError(
      f'{file.path} has a tensor that a {model.architecture} of this size has'
      f' not: {extra[0]} ({len(extra)} superfluous)'
      f'{safetensors_files.prefix_hint(file.names, known)}'
    )
  for name in names:
    file.check(name, known[name].shape, f'its {_CONFIG} asks')
  return {name: _imported(file, name, known[name]) for name in names}


def _imported(
  file: safetensors_files.File, name: str, tensor: hugging_face.Tensor
) -> np.ndarray:
  """Returns a tensor as we have it, float32, a copy of its own."""
  array = checkpoint_files.to_float32(file.tensor(name), name)
  return np.ascontiguousarray(array.T if tensor.transposed else array)


def _complete(
  folder: epath.Path, found: dict[str, np.ndarray], model: hugging_face.Model
) -> None:
  """Gives every tensor of several names the name that the layout has.

  Raises:
    UserError: what should be one tensor is two.
  """
  firsts = {name: name for name in model.copies.values() if name in found}
  for copy, name in model.copies.items():
    if copy not in found:
      continue
    first = firsts.setdefault(name, copy)
    if not np.array_equal(found[copy], found[first], equal_nan=True):
      raise errors.UserError(f'{folder}: tensor {copy} differs from {first}')
    found[name] = found[first]
  for name, other in model.substitutes.items():
    if name not in found and other in found:
      logging.info('%s: %s is %s', folder, name, other)
      turned = model.tensors[name].transposed != model.tensors[other].transposed
      array = found[other].T if turned else found[other]
      found[name] = np.ascontiguousarray(array)


def _check_params(
  layout: Mapping[str, hugging_face.Tensor], flat: Mapping[str, Any]
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


def _exported(
  tensor: hugging_face.Tensor, flat: Mapping[str, Any], dtype: Any
) -> np.ndarray:
  """Returns the array as they store it."""
  array = checkpoint_files.to_float32(
    np.asarray(flat[tensor.path]), tensor.path
  )
  array = array.astype(dtype, copy=False)
  return np.ascontiguousarray(array.T if tensor.transposed else array)


def _shards(
  layout: Mapping[str, hugging_face.Tensor], largest_bytes: int
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
