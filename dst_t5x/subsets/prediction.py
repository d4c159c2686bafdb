"""The size of a subset file, known before there is a subset."""

from collections.abc import Mapping
import math
from typing import Any

import numpy as np

from dst_t5x.subsets import extraction
from dst_t5x.subsets import file
from dst_t5x.subsets import position_codes
from dst_t5x.subsets import table

PyTree = Any

_NO_SEED = {'fingerprint': '0' * 64}


def predicted_bytes(
  params: PyTree, free: int, about: Mapping[str, Any] | None = None
) -> int:
  """Returns the expected size of the file of a subset, in bytes.

  The expectation is over random positions. For other positions, the file is at
  most 0.06 bytes a component larger and 0.2 bytes smaller. With float32, the
  prediction is within 5 %, apart from `about`.

  Args:
    params: tree of leaves with shape and dtype, stacked or not.
    free: number of free components, `sum(layout.budgets(epsilon))`.
    about: the file's metadata, as far as they are known.
  """
  tensors = extraction.types_of(params)
  size = table.size(tensors)
  k = position_codes.remainder_bits(free, size)
  code_bytes = math.ceil(position_codes.expected_bytes(free, size))
  # Free components have the same mix of dtypes as all parameters.
  all_bytes = sum(
    math.prod(t.shape) * np.dtype(t.dtype).itemsize for t in tensors.values()
  )
  remainders = (k, -(-free // 8))
  shapes = {
    'tensors': (len(table.to_text(tensors)),),
    'quotients': (code_bytes - math.prod(remainders),),
    'remainders': remainders,
    'values': (round(free * all_bytes / size) if size else 0,),
  }
  seed = {**_NO_SEED, **((about or {}).get('seed') or {})}
  header = file.header_of(shapes, {**(about or {}), 'seed': seed})
  return (
    len(header) + sum(map(math.prod, shapes.values())) + file.CHECKSUM_BYTES
  )
