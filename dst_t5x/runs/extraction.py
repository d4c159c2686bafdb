"""Extracts the subset in which trained parameters differ from the seed."""

from typing import Any

import jax
import numpy as np

from dst_t5x import subsets
from dst_t5x.core import parts
from dst_t5x.core import stacking
from dst_t5x.runtime import processes

PyTree = Any


class Extraction:
  """Compares trained parameters with a copy of the seed."""

  def __init__(self, seed: PyTree, is_partial: bool) -> None:
    """Keeps the seed.

    Args:
      seed: θ⁰ on the host, unstacked.
      is_partial: whether only some of the seed's parameters are trained.
    """
    self.seed = seed
    self._is_partial = is_partial

  def extract(self, trained: PyTree) -> subsets.Subset:
    """Returns the components that differ from the seed, all in each process.

    Args:
      trained: the trained parameters, stacked or not; on the devices if there
        are several processes.
    """
    if jax.process_count() == 1:
      return self.extract_on_host(trained)
    here = subsets.to_arrays(subsets.extract_here(trained, self.seed))
    blobs = processes.gather_bytes(here['subset'].tobytes())
    return subsets.merge(
      [
        subsets.from_arrays({'subset': np.frombuffer(blob, np.uint8)})
        for blob in blobs
      ]
    )

  def extract_on_host(self, trained: PyTree) -> subsets.Subset:
    """Returns the components that differ, from parameters on this host."""
    if self._is_partial:
      trained = parts.join(self.seed, stacking.unstack_layers(trained))
    return subsets.extract(trained, self.seed)

  def apply(self, subset: subsets.Subset) -> PyTree:
    """Returns all parameters, with a subset applied to the seed."""
    return subsets.apply(subset, self.seed)
