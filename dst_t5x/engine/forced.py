"""Teacher-forced evaluation: the loss of the examples of a split."""

from collections.abc import Mapping
import dataclasses
import math
from typing import Any, NamedTuple

from dst_t5x.runtime import quiet_tensorflow  # noqa: F401

# isort: split
import jax
import numpy as np
import seqio

from dst_t5x.core import values
from dst_t5x.data import pipeline
from dst_t5x.data import task_checks
from dst_t5x.data import task_examples
from dst_t5x.data import task_vocabulary
from dst_t5x.engine import losses
from dst_t5x.engine import partitioning
from dst_t5x.models import api

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Examples:
  """The examples of a split.

  Attributes:
    task: a registered task or mixture.
    feature_lengths: feature -> longest length; longer examples are truncated.
    split: the name of the split.
    batch_size: the number of examples in a batch, rounded up so that the
      devices share it evenly.
    num_examples: the number of examples of each task; None for all.
  """

  task: str
  feature_lengths: Mapping[str, values.Positive]
  split: str = 'validation'
  batch_size: values.Positive = 32
  num_examples: values.Positive | None = None

  def check(
    self, network: api.Network, in_chat: bool = True
  ) -> task_examples.Task:
    """Reads the first examples; returns the task.

    Args:
      network: the model; it must have an embedding for each id of the task.
      in_chat: whether a chat template, if there is one, must have an effect.
        Without it, texts may end with another token than answers.

    Raises:
      UserError: the task, the split or the data do not exist, or the vocabulary
        does not fit.
    """
    task = task_checks.check(
      self.task, self.feature_lengths, self.batch_size, self.split, in_chat
    )
    task_vocabulary.check_fits(task.output_features, network.vocab_size)
    if in_chat or not task_vocabulary.has_chat():
      task_vocabulary.check_special(
        task.output_features, network.eos_id, network.begin_id
      )
    return task

  def counts_bytes(self) -> bool:
    """Returns whether the bytes of the examples' texts are known.

    They are for documents, and for a whole split only.
    """
    task = task_checks.find(self.task)
    return self.num_examples is None and task_checks.counts_bytes(
      task, self.split
    )


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
    examples: Examples,
    partitioner: partitioning.Partitioner,
    loss: losses.Loss | None = None,
  ) -> None:
    """Counts the bytes of the examples, if they are known.

    Args:
      examples: the examples, checked.
      partitioner: the mesh and its shardings.
      loss: the loss; the plain cross entropy by default.
    """
    self._examples = examples
    self._partitioner = partitioner
    self._loss = loss or losses.Loss(z_loss=0.0)
    self._sums = jax.jit(
      losses.forward,
      static_argnames=('network', 'loss'),
      out_shardings=partitioner.replicated,
    )
    self._bytes = (
      task_checks.bytes_of(task_checks.find(examples.task), examples.split)
      if examples.counts_bytes()
      else None
    )

  def __call__(self, network: api.Network, params: PyTree) -> Forced:
    """Returns the results of a network with these parameters."""
    examples = self._examples
    batches = pipeline.eval_batches(
      seqio.get_mixture_or_task(examples.task),
      examples.feature_lengths,
      self._partitioner.round_up(examples.batch_size),
      network.feature_converter(pack=False),
      examples.split,
      examples.num_examples,
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
