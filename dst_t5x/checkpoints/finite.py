"""Refuses parameters that are NaN or infinite."""

from collections.abc import Mapping
from concurrent import futures
import os
from typing import Any

import numpy as np

from dst_t5x.core import errors
from dst_t5x.core import parts


def check(params: Mapping[str, Any], path: str) -> None:
  """Raises UserError for NaN or infinity, which would make losses NaN later."""
  flat = parts.flatten(params)

  def is_finite(array: np.ndarray) -> bool:
    # Minimum and maximum are NaN if any value is. They need no array of bools.
    return not array.size or bool(np.isfinite([array.max(), array.min()]).all())

  with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    finite = dict(zip(flat, pool.map(is_finite, flat.values()), strict=True))
  bad = [name for name in sorted(flat) if not finite[name]]
  if bad:
    array = flat[bad[0]]
    count = np.count_nonzero(~np.isfinite(array))
    raise errors.UserError(
      f'{path}: {count:,} of {array.size:,} values of tensor {bad[0]} are NaN'
      f' or infinite ({len(bad)} such tensors); take a checkpoint from before'
      ' training diverged, or one that was not cast to float16'
    )
