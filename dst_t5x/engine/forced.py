"""Teacher-forced evaluation: the loss of the examples of a split."""

import math
from typing import Any, NamedTuple

import jax
import numpy as np

from dst_t5x.engine import losses
from dst_t5x.engine import partitioning
from dst_t5x.engine import sources
from dst_t5x.models import api

PyTree = Any


class Forced(NamedTuple):
  """The teacher-forced results of some parameters.

  Attributes:
    loss: cross entropy per target token, in nats. z-loss is part of the
      objective, not of the reported loss.
    accuracy: the share of target tokens that are the most probable ones.
    bits_per_byte: the cross entropy of all target tokens, in bits, divided by
      the bytes of the texts; None if these are not known.
  """

  loss: float
  accuracy: float
  bits_per_byte: float | None

  def named(self, prefix: str) -> dict[str, float]:
    """Returns `prefix/name` -> value, of the known ones."""
    return {
      f'{prefix}/{name}': value
      for name, value in self._asdict().items()
      if value is not None
    }


class ForcedEvaluator:
  """Computes the teacher-forced loss of the same examples each time."""

  def __init__(
    self,
    source: sources.Source,
    examples: sources.Examples,
    partitioner: partitioning.Partitioner,
    loss: losses.Loss | None = None,
  ) -> None:
    """Counts the bytes of the examples, if they are known.

    Args:
      source: where the examples come from.
      examples: the examples, checked.
      partitioner: the mesh and its shardings.
      loss: the loss; the plain cross entropy by default.
    """
    self._source = source
    self._examples = examples
    self._partitioner = partitioner
    self._loss = loss or losses.Loss(z_loss=0.0)
    self._sums = jax.jit(
      losses.forward,
      static_argnames=('network', 'loss'),
      out_shardings=partitioner.replicated,
    )
    self._bytes = source.bytes_of(examples)

  def __call__(self, network: api.Network, params: PyTree) -> Forced:
    """Returns the results of a network with these parameters."""
    examples = self._examples
    batches = self._source.batches(
      examples, network, self._partitioner.round_up(examples.batch_size)
    )
    place = self._partitioner.place_batch
    sums = [
      jax.device_get(self._sums(network, self._loss, params, place(batch)))
      for batch in batches
    ]
    total = jax.tree.map(lambda *parts: np.sum(parts, dtype=np.float64), *sums)
    averages = total.averages()
    bits = None
    if self._bytes:
      bits = float(total.cross_entropy / math.log(2) / self._bytes)
    return Forced(float(averages['loss']), float(averages['accuracy']), bits)
