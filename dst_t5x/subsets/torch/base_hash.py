"""The fingerprint of a model in PyTorch, computed block by block.

It is that of `subsets.fingerprint`: of T5X's paths and axes, and by default of
float32, in which seeds are trained.
"""

from collections.abc import Mapping
from concurrent import futures
import hashlib

from dst_t5x.subsets import definition
from dst_t5x.subsets import dtypes
from dst_t5x.subsets import fingerprint
from dst_t5x.subsets.torch import tensors as tensors_lib

# Each holds one block.
_THREADS = 4


def of_tensors(
  tensors: tensors_lib.Tensors, types: definition.Tensors | None = None
) -> str:
  """Returns the fingerprint of a model, 64 hexadecimal digits.

  Args:
    tensors: of the model.
    types: path -> type, of the seed; None where all are float32.

  Raises:
    UserError: the seed's dtypes do not hold the model's values.
  """
  names = names_of(types or {})

  def line(path: str) -> str:
    tensor, dtype = tensors[path], names.get(path, 'float32')
    digest = hashlib.sha256()
    for block in tensors_lib.blocks(tensor, tensors_lib.DTYPES[dtype]):
      digest.update(tensors_lib.bits(block).numpy().data)
    return fingerprint.line(path, dtype, tensor.our_shape, digest.hexdigest())

  with futures.ThreadPoolExecutor(_THREADS) as pool:
    return fingerprint.of_lines(pool.map(line, sorted(tensors)))


def names_of(types: definition.Tensors) -> Mapping[str, str]:
  """Returns path -> name of the dtype."""
  return {path: dtypes.name(kind.dtype) for path, kind in types.items()}
