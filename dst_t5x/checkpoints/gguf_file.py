"""Reads GGUF files, llama.cpp's format, through the package `gguf`.

A file holds metadata, which state the architecture, sizes and the tokenizer,
and tensors, most of them quantised.
"""

import collections
from collections.abc import Iterator
import contextlib
import functools
import os
from typing import Any

from etils import epath
import numpy as np

from dst_t5x.core import json_object
from dst_t5x.core import object_stores
from dst_t5x.core.errors import UserError, first_line

SUFFIX = '.gguf'


def is_file(path: epath.PathLike) -> bool:
  """Returns whether a path names a GGUF file."""
  return os.fspath(path).endswith(SUFFIX)


class File:
  """An open file.

  Attributes:
    path: where it came from.
    metadata: name -> value.
    shapes: name of a tensor -> its shape, the slowest axis first.
  """

  def __init__(self, path: epath.Path, reader: Any) -> None:
    self.path = path
    self._tensors = {tensor.name: tensor for tensor in reader.tensors}
    self.metadata = json_object.JsonObject(
      {name: _value(field) for name, field in reader.fields.items()},
      str(path),
    )
    self.shapes: dict[str, tuple[int, ...]] = {
      name: tuple(int(size) for size in reversed(tensor.shape))
      for name, tensor in self._tensors.items()
    }

  @property
  def types(self) -> str:
    """How many tensors there are of which type, for messages."""
    counts = collections.Counter(
      tensor.tensor_type.name for tensor in self._tensors.values()
    )
    listed = ', '.join(f'{n} of {kind}' for kind, n in counts.most_common())
    return listed.replace(' of ', ' tensors of ', 1)

  def tensor(self, name: str) -> np.ndarray:
    """Returns a tensor, float32, a copy of its own."""
    from gguf import quants

    tensor = self._tensors[name]
    array = quants.dequantize(tensor.data, tensor.tensor_type)
    return np.array(array, np.float32).reshape(self.shapes[name])


def _value(field: Any) -> Any:
  """Returns a value of the metadata.

  Floats are of single precision there: 1e-5 would come out as
  9.999999747378752e-06.
  """
  value = field.contents()
  if isinstance(value, float):
    return float(str(np.float32(value)))
  return value


@contextlib.contextmanager
def opened(path: epath.PathLike) -> Iterator[File]:
  """Opens a file, on this disk or in a bucket.

  Raises:
    UserError: it is missing, truncated, damaged or no GGUF file, or has a
      quantisation that is not known.
  """
  import gguf  # Takes a while, and most checkpoints are of another format.

  path = epath.Path(path).expanduser()
  with contextlib.ExitStack() as stack:
    with object_stores.explained(path, f'cannot read {path}: '):
      if not path.exists():
        raise UserError(f'there is no {path}')
      here = stack.enter_context(object_stores.on_this_disk(path))
    try:
      reader = gguf.GGUFReader(here)
      file = File(path, reader)
    except Exception as e:  # NumPy's and Python's, of whatever kind.
      raise UserError(
        f'{path} is truncated or damaged, or no GGUF file, or of a type that'
        f' the package gguf does not know: {first_line(e)}'
      ) from e
    if reader.byte_order != 'I':
      raise UserError(f'{path} has the byte order of another kind of machine')
    for tensor in reader.tensors:
      if not _is_known(tensor.tensor_type):
        raise UserError(
          f'{path}: tensor {ascii(tensor.name)[1:-1]} has the quantisation'
          f' {tensor.tensor_type.name}, which the package gguf does not undo'
        )
    yield file


@functools.cache
def _is_known(kind: Any) -> bool:
  """Returns whether tensors of a type can be dequantised."""
  from gguf import constants
  from gguf import quants

  if kind.name in ('F32', 'F16'):
    return True
  _, num_bytes = constants.GGML_QUANT_SIZES[kind]
  try:
    quants.dequantize(np.zeros((1, num_bytes), np.uint8), kind)
  except NotImplementedError:
    return False
  return True
