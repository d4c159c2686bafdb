"""Converts the content of a subset to a few arrays of bytes, and back.

docs/subset_format.md describes the arrays. Reading invalid arrays never
allocates much more memory than they have.
"""

from collections.abc import Mapping

import numpy as np

from dst_t5x.core.errors import UserError, first_line
from dst_t5x.subsets import definition
from dst_t5x.subsets import dtypes
from dst_t5x.subsets import position_codes
from dst_t5x.subsets import table

NAMES = ('tensors', 'quotients', 'remainders', 'values')
_LEAST_VALUE_BYTES = min(dtype.itemsize for dtype in dtypes.DTYPES.values())

Arrays = Mapping[str, np.ndarray]


def to_arrays(subset: definition.Subset) -> dict[str, np.ndarray]:
  """Returns the arrays of a subset file, without the checksum.

  Returns:
    Arrays of uint8: `tensors` [bytes], `quotients` [bytes], `remainders`
    [k, ⌈size / 8⌉], `values` [bytes]; see docs/subset_format.md.

  Raises:
    UserError: the subset is inconsistent, a value is not finite, or a file
      cannot store one of the tensors.
  """
  definition.check_entries(subset)
  definition.check_finite(subset.values)
  positions, values, start = [np.zeros(0, np.int64)], [b''], 0
  for path in sorted(subset.tensors):
    if path in subset.positions:
      positions.append(subset.positions[path] + start)
      values.append(subset.values[path].tobytes())
    start += subset.tensors[path].size
  text = table.to_text(subset.tensors).encode()
  quotients, remainders = position_codes.encode(
    np.concatenate(positions), start
  )
  arrays = (
    np.frombuffer(text, np.uint8),
    quotients,
    remainders,
    np.frombuffer(b''.join(values), np.uint8),
  )
  return dict(zip(NAMES, arrays, strict=True))


def from_arrays(arrays: Arrays) -> definition.Subset:
  """Inverse of `to_arrays`; the fingerprint is None.

  Raises:
    UserError: an array is missing or damaged, or arrays are inconsistent.
  """
  try:
    text, quotients, remainders, values = (
      np.asarray(arrays[name], np.uint8) for name in NAMES
    )
    tensors = table.from_text(text.tobytes().decode())
  except (KeyError, UnicodeDecodeError) as e:
    raise UserError(f'subset: it is damaged: {first_line(e)}') from e
  if position_codes.number(quotients) * _LEAST_VALUE_BYTES > len(values):
    raise UserError('subset: it has not one value for each position')
  sizes = [tensor.size for tensor in tensors.values()]
  starts = np.cumsum([0, *sizes])
  everywhere = position_codes.decode(quotients, remainders, int(starts[-1]))
  borders = np.searchsorted(everywhere, starts).tolist()
  positions, raw = {}, {}
  byte = 0
  for i, (path, tensor) in enumerate(tensors.items()):
    if borders[i] < borders[i + 1]:
      positions[path] = everywhere[borders[i] : borders[i + 1]] - starts[i]
      end = byte + len(positions[path]) * tensor.dtype.itemsize
      raw[path] = values[byte:end]
      byte = end
  if byte != len(values):
    raise UserError('subset: it has not one value for each position')
  typed = {path: raw[path].view(tensors[path].dtype) for path in raw}
  definition.check_finite(typed)
  return definition.Subset(tensors, positions, typed)
