"""The table of a subset: the tensors of its seed, as text.

Each tensor has a line, the same as in the seed's fingerprint without the hash:

    layers_0/mlp/wo/kernel float32 1024,512

Layers with the same shapes and dtypes share a line in their stacked form:

    layers/mlp/wo/kernel float32 8,1024,512
"""

import math
import re

import numpy as np

from dst_t5x.core import tree_paths
from dst_t5x.core.errors import UserError
from dst_t5x.subsets import position_codes
from dst_t5x.subsets.definition import Tensors
from dst_t5x.subsets.definition import TensorType
from dst_t5x.subsets.dtypes import DTYPES
from dst_t5x.subsets.dtypes import name as name_of

MOST_TENSORS = 100_000
_SIZE = r'(?:0|[1-9][0-9]{0,14})'
_LINE = re.compile(
  rf'(.+) ({"|".join(DTYPES)}) ((?:{_SIZE}(?:,{_SIZE}){{0,31}})?)'
)


def to_text(tensors: Tensors) -> str:
  """Returns the lines in the order of their paths, each with a newline.

  Args:
    tensors: unstacked path -> shape and dtype.

  Raises:
    UserError: the table cannot represent a dtype or a path.
  """
  lines = {
    path: _line(path, tensor.dtype, tensor.shape)
    for path, tensor in tensors.items()
  }
  for stacked, layers in _alike(tensors).items():
    for path in layers:
      del lines[path]
    first = tensors[layers[0]]
    shape = (len(layers), *first.shape)
    lines[stacked] = _line(stacked, first.dtype, shape)
  text = ''.join(lines[path] for path in sorted(lines))
  if from_text(text) != dict(tensors):
    raise UserError(
      'subset: a component `layers` of a path would be taken for stacked layers'
    )
  return text


def _alike(tensors: Tensors) -> dict[str, list[str]]:
  """Returns stacked path -> paths of its layers, for layers that are alike."""
  groups: dict[str, dict[str, str]] = {}
  for path in tensors:
    if found := tree_paths.stacked_path(path):
      stacked, number = found
      groups.setdefault(stacked, {})[number] = path
  alike = {}
  for stacked, by_number in groups.items():
    layers = [by_number.get(str(i), '') for i in range(len(by_number))]
    if all(layers) and len({_type(tensors[path]) for path in layers}) == 1:
      alike[stacked] = layers
  return alike


def _type(tensor: TensorType) -> tuple[np.dtype, tuple[int, ...]]:
  return tensor.dtype, tensor.shape


def _line(path: str, dtype: np.dtype, shape: tuple[int, ...]) -> str:
  line = f'{path} {name_of(dtype)} {",".join(map(str, shape))}'
  if name_of(dtype) not in DTYPES:
    raise UserError(
      f'subset: {path} is {name_of(dtype)}; a file holds {", ".join(DTYPES)}'
    )
  if not (path and path.isprintable() and _LINE.fullmatch(line)):
    raise UserError(f'subset: a file cannot hold a tensor called {path!r}')
  return f'{line}\n'


def from_text(text: str) -> dict[str, TensorType]:
  """Inverse of `to_text`; the paths are in ascending order.

  Raises:
    UserError: a line is invalid, a path appears twice, or there are too many
      tensors or components.
  """
  tensors: dict[str, TensorType] = {}
  found = components = 0
  for line in text.split('\n')[:-1]:
    match = _LINE.fullmatch(line)
    if not match or not match[1].isprintable():
      raise UserError(f'subset: its table is damaged at {line[:80]!r}')
    path, dtype, shape = match[1], DTYPES[match[2]], _shape(match[3])
    components += math.prod(shape)
    found += shape[0] if tree_paths.is_stacked(path, shape) else 1
    # This check precedes making the paths of perhaps a billion layers.
    if found > MOST_TENSORS or components > position_codes.MOST:
      raise UserError('subset: its table claims too many tensors or components')
    stacked, paths = tree_paths.slice_paths(path, shape)
    tensor = TensorType(shape[int(stacked) :], dtype)
    tensors |= dict.fromkeys(paths, tensor)
  if len(tensors) != found or (text and not text.endswith('\n')):
    raise UserError('subset: its table is damaged')
  return dict(sorted(tensors.items()))


def _shape(text: str) -> tuple[int, ...]:
  return tuple(int(size) for size in text.split(',')) if text else ()


def size(tensors: Tensors) -> int:
  """Returns the number of components of all tensors."""
  return sum(math.prod(tensor.shape) for tensor in tensors.values())
