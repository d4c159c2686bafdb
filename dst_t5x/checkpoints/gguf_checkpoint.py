"""Models in GGUF files, dequantised to float32."""

import functools
import re

from absl import logging
from etils import epath
import numpy as np

from dst_t5x.checkpoints import checkpoint_files
from dst_t5x.checkpoints import gguf_file
from dst_t5x.checkpoints import gguf_tokenizer
from dst_t5x.core import json_object
from dst_t5x.core import parts
from dst_t5x.core.errors import UserError
from dst_t5x.models import families
from dst_t5x.models import hugging_face


def load(path: epath.PathLike) -> checkpoint_files.LoadedCheckpoint:
  """Reads the parameters of a GGUF file; their step is 0.

  Args:
    path: a file, which may be in an object store.

  Raises:
    UserError: the file is missing or damaged, the model is of no known
      architecture, or a tensor is missing, superfluous or misshapen.
  """
  with gguf_file.opened(path) as file:
    family = families.of_gguf(file.metadata)
    found = family.read_gguf(file.metadata, file.shapes, file.tensor)
    names = _names(file, found)
    checkpoint_files.check_fits(
      sum(tensor.num_bytes for tensor in found.model.tensors.values()),
      file.path,
    )
    params = {
      tensor.path: _imported(file, names[name], name, found)
      for name, tensor in found.model.tensors.items()
    }
  return checkpoint_files.LoadedCheckpoint(
    parts.unflatten(params),
    step=0,
    network=found.model.network,
    companions=functools.partial(_companions, file.metadata),
    note=f'dequantised from {file.types}',
  )


def _companions(metadata: json_object.JsonObject) -> dict[str, bytes]:
  """Returns the files of the tokenizer; none where its kind is not known."""
  try:
    return gguf_tokenizer.files(metadata)
  except UserError as error:
    logging.warning('The tokenizer is left out: %s', error)
    return {}


def _names(
  file: gguf_file.File, found: hugging_face.GgufModel
) -> dict[str, str]:
  """Returns Hugging Face's name -> the file's, of all tensors.

  Raises:
    UserError: one is missing, superfluous or misshapen.
  """
  import gguf

  kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
  kind = kinds[file.metadata.get('general.architecture', str)]
  layers = 1 + max(
    int(layer)
    for name in found.model.tensors
    for layer in re.findall(r'\.(\d+)\.', name)
  )
  table = gguf.get_tensor_name_map(kind, layers)
  names = {}
  for name, tensor in found.model.tensors.items():
    module, _, suffix = name.rpartition('.')
    theirs = f'{table.get_name(module)}.{suffix}'
    names[name] = theirs
    if theirs not in file.shapes:
      raise UserError(f'{file.path} lacks tensor {theirs}')
    if file.shapes[theirs] != tensor.shape:
      raise UserError(
        f'{file.path}: tensor {theirs} is {file.shapes[theirs]}, its metadata'
        f' ask for {tensor.shape}'
      )
  extra = sorted(file.shapes.keys() - set(names.values()) - set(found.unused))
  if extra:
    raise UserError(
      f'{file.path} has a tensor that a {found.model.architecture} has not:'
      f' {ascii(extra[0])[1:-1]} ({len(extra)} superfluous)'
    )
  return names


def _imported(
  file: gguf_file.File, theirs: str, name: str, found: hugging_face.GgufModel
) -> np.ndarray:
  """Returns a tensor as we have it."""
  array = found.restored(name, file.tensor(theirs))
  turned = found.model.tensors[name].transposed
  return np.ascontiguousarray(array.T if turned else array)
