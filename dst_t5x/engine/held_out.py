"""Held-out text: what tuning a model on one task makes it forget of others."""

from collections.abc import Mapping
import dataclasses
import json
from typing import Any

from dst_t5x.core import json_text
from dst_t5x.core import metrics_file
from dst_t5x.core import values
from dst_t5x.core.errors import UserError, check_positive, first_line
from dst_t5x.engine import forced
from dst_t5x.engine import live
from dst_t5x.engine import partitioning
from dst_t5x.engine import sources
from dst_t5x.models import api

LOSS = f'{metrics_file.HELD_OUT}/loss'
BITS_PER_BYTE = f'{metrics_file.HELD_OUT}/bits_per_byte'
# The rise of the loss since the seed.
FORGETTING = metrics_file.FORGETTING


@dataclasses.dataclass(frozen=True)
class HeldOut:
  """Examples of general text, on which nothing is trained.

  Attributes:
    examples: the examples.
    source: where they come from.
  """

  examples: sources.Examples
  source: sources.Source = live.LIVE

  def check(self, network: api.Network) -> None:
    """Checks the examples, and that the rows fit the network.

    Raises:
      UserError: see `sources.Source.check`.
    """
    asked = self.examples
    check_positive('HELD_OUT_EXAMPLES', asked.num_examples or 1)
    try:
      self.source.check(asked, network, in_chat=False)
      network.batch_shapes(asked.feature_lengths, asked.batch_size, pack=False)
    except UserError as error:
      raise UserError(
        f'HELD_OUT_TASK = {asked.task!r}: {first_line(error)}'
      ) from error

  def metrics(self) -> list[str]:
    """Returns the names of the metrics of an evaluation."""
    counts = self.source.counts_bytes(self.examples)
    return [LOSS, *([BITS_PER_BYTE] if counts else [])]

  def about(self) -> dict[str, Any]:
    """Returns what decides the loss of some parameters, as JSON."""
    settings = dataclasses.asdict(self.examples)
    del settings['batch_size']  # It changes the rounding only.
    rows = self.source.rows_of(self.examples.task, self.examples.split)
    said: dict[str, Any] = json.loads(
      json_text.dumps({**settings, 'rows': rows})
    )
    return said

  def evaluator(
    self, partitioner: partitioning.Partitioner
  ) -> forced.ForcedEvaluator:
    """Returns what computes the loss of some parameters."""
    return forced.ForcedEvaluator(self.source, self.examples, partitioner)


def examples(
  task: str | None = None,
  feature_lengths: Mapping[str, values.Positive] | None = None,
  usual_lengths: Mapping[str, values.Positive] | None = None,
  split: str = 'validation',
  batch_size: values.Positive = 32,
  num_examples: values.Positive | None = None,
) -> HeldOut | None:
  """Returns the examples that gin chooses; None without HELD_OUT_TASK.

  Args:
    task: HELD_OUT_TASK, a registered task or mixture.
    feature_lengths: HELD_OUT_FEATURE_LENGTHS.
    usual_lengths: TASK_FEATURE_LENGTHS, if `feature_lengths` is None.
    split: the name of the split.
    batch_size: the number of examples in a batch.
    num_examples: the number of examples of each task; None for all.
  """
  if task is None:
    return None
  lengths = feature_lengths or usual_lengths or {}
  return HeldOut(
    sources.Examples(task, lengths, split, batch_size, num_examples)
  )


def results_of(found: forced.Forced) -> dict[str, float]:
  """Returns name -> value of the metrics of an evaluation."""
  named = found.named(metrics_file.HELD_OUT)
  return {name: named[name] for name in (LOSS, BITS_PER_BYTE) if name in named}


def with_forgetting(
  results: Mapping[str, float], loss_of_seed: float | None
) -> dict[str, float]:
  """Returns the metrics of an evaluation, with `held_out/forgetting`.

  Args:
    results: the metrics.
    loss_of_seed: the seed's `held_out/loss`; None if it is not known.
  """
  if loss_of_seed is None or LOSS not in results:
    return dict(results)
  return {**results, FORGETTING: results[LOSS] - loss_of_seed}
