"""The dtypes of tensors in subset files, with or without `ml_dtypes`.

NumPy has no bfloat16. Where `ml_dtypes` is not installed, as beside PyTorch
alone, an opaque dtype of two bytes takes its place. Values are only compared,
copied and checked, all of which is done with their bits.
"""

import numpy as np

try:
  import ml_dtypes

  _BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
except ImportError:
  _BFLOAT16 = np.dtype([('bfloat16', '<u2')])

# Name -> dtype.
DTYPES = {
  'bfloat16': _BFLOAT16,
  'float16': np.dtype('<f2'),
  'float32': np.dtype('<f4'),
  'float64': np.dtype('<f8'),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Name -> the bits of the exponent; all are set in infinities and NaN.
_EXPONENTS = {
  'bfloat16': 0x7F80,
  'float16': 0x7C00,
  'float32': 0x7F80_0000,
  'float64': 0x7FF0_0000_0000_0000,
}


def name(dtype: np.dtype) -> str:
  """Returns the name of a dtype, of any; of big-endian ones, such as `>f4`."""
  found = np.dtype(dtype)
  return _NAMES.get(found, found.name if found.isnative else found.str)


def bits(array: np.ndarray) -> np.ndarray:
  """Returns the array's bits as unsigned integers of the same width."""
  return array.view(np.dtype(f'uint{8 * array.dtype.itemsize}'))


def is_finite(array: np.ndarray) -> np.ndarray:
  """Returns for each component whether it is finite."""
  exponent = _EXPONENTS.get(name(array.dtype))
  if exponent is None:
    return np.isfinite(array)
  found = bits(array)
  mask = found.dtype.type(exponent)
  return (found & mask) != mask
