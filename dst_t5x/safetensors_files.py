"""Reads safetensors files, bfloat16 included, into NumPy arrays.

The library's NumPy reader knows no bfloat16. The format is small: the length of
the header (8 bytes, little-endian), the header (JSON: name → dtype, shape,
data_offsets), the tensors' bytes (https://github.com/huggingface/safetensors).
"""

import json
import math
from typing import Any

from etils import epath
import ml_dtypes
import numpy as np

from dst_t5x import errors
from dst_t5x import object_stores

_DTYPES = {
  'F32': np.dtype('<f4'),
  'F16': np.dtype('<f2'),
  'BF16': np.dtype(ml_dtypes.bfloat16),
}
_LENGTH_BYTES = 8
_METADATA = '__metadata__'


def read(file: epath.Path) -> dict[str, np.ndarray]:
  """Returns the tensors of a file as read-only views of its bytes.

  Args:
    file: on this disk, where it is mapped into memory, or in a bucket, where it
      is fetched whole.

  Raises:
    UserError: the file cannot be read, is truncated or damaged, or holds a
      tensor that is not float32, float16 or bfloat16.
  """
  header, data = _parts(file)
  return {
    name: _tensor(data, entry, f'{name} of {file}')
    for name, entry in header.items()
    if name != _METADATA
  }


def read_metadata(file: epath.Path) -> dict[str, str]:
  """Returns what a file's writer said besides its tensors.

  Raises:
    UserError: as `read` does.
  """
  header, _ = _parts(file)
  return header.get(_METADATA, {})


def _parts(file: epath.Path) -> tuple[dict[str, Any], np.ndarray]:
  """Returns the header of a whole file, and the data, uint8 [bytes]."""
  try:
    content = _bytes(file)
    start = _LENGTH_BYTES + int(content[:_LENGTH_BYTES].view('<u8')[0])
    header = json.loads(content[_LENGTH_BYTES:start].tobytes())
    end = max(
      entry['data_offsets'][1]
      for name, entry in header.items()
      if name != _METADATA
    )
  except (OSError, ValueError, IndexError, KeyError, TypeError) as error:
    raise errors.UserError(
      f'{file} is truncated or no safetensors file: {error}'
    ) from error
  if start + end != len(content):
    raise errors.UserError(
      f'{file} is truncated or damaged: {len(content)} bytes, not {start + end}'
    )
  return header, content[start:]


def _bytes(file: epath.Path) -> np.ndarray:
  """Returns the content as uint8 [bytes]."""
  if object_stores.is_remote(file):
    return np.frombuffer(file.read_bytes(), np.uint8)
  return np.memmap(file, np.uint8, mode='r')


def _tensor(data: np.ndarray, entry: dict[str, Any], name: str) -> np.ndarray:
  """Returns one tensor as a view of `data`, uint8 [bytes]."""
  if entry['dtype'] not in _DTYPES:
    raise errors.UserError(
      f'tensor {name} is {entry["dtype"]}, not F32, F16 or BF16'
    )
  dtype = _DTYPES[entry['dtype']]
  start, end = entry['data_offsets']
  if end - start != math.prod(entry['shape']) * dtype.itemsize:
    raise errors.UserError(f'tensor {name} is damaged: wrong number of bytes')
  # Tensors need not be aligned in the file, hence through bytes.
  return data[start:end].view(dtype).reshape(entry['shape'])
