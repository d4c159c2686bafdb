"""The source of batches that seqio makes while a run goes on.

TensorFlow and seqio are imported when they are needed: without them, gin's
files can still name this source.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
from typing import TYPE_CHECKING, Any

from dst_t5x.data import data_position
from dst_t5x.engine import sources
from dst_t5x.models import api

if TYPE_CHECKING:
  from dst_t5x.data import task_examples


class Live(sources.Source):
  """Registered tasks and mixtures of seqio."""

  @property
  def recorded(self) -> Mapping[str, Any]:
    """See `sources.Source`."""
    return {}

  def check_training(
    self, data: sources.TrainData, network: api.Network
  ) -> int:
    """See `sources.Source`."""
    from dst_t5x.data import task_checks

    del network
    task = task_checks.check(data.task, data.feature_lengths, data.batch_size)
    size: int = task.output_features['inputs'].vocabulary.vocab_size
    return size

  def rows_of(self, task: str, split: str) -> dict[str, Any]:
    """See `sources.Source`."""
    from dst_t5x.data import task_checks

    return task_checks.rows_of(task_checks.find(task), split)

  def encode(self, task: str) -> Callable[[str], list[int]]:
    """See `sources.Source`."""
    features = _find(task).output_features
    encode: Callable[[str], list[int]] = features['targets'].vocabulary.encode
    return encode

  def train_batches(
    self,
    data: sources.TrainData,
    network: api.Network,
    stretch: sources.Stretch,
  ) -> contextlib.AbstractContextManager[Iterator[data_position.TrainItem]]:
    """See `sources.Source`."""
    from dst_t5x.data import pipeline

    return pipeline.TrainIterator(
      _find(data.task),
      data.feature_lengths,
      data.batch_size,
      network.feature_converter(data.pack),
      random_seed=stretch.random_seed,
      step=stretch.step,
      position=stretch.position,
      save_after=stretch.save_after,
      place=stretch.place,
      num_shards=data.shards,
      rows=stretch.rows,
    )

  def check(
    self,
    examples: sources.Examples,
    network: api.Network,
    in_chat: bool = True,
  ) -> None:
    """See `sources.Source`."""
    from dst_t5x.data import task_checks
    from dst_t5x.data import task_vocabulary

    task = task_checks.check(
      examples.task,
      examples.feature_lengths,
      examples.batch_size,
      examples.split,
      in_chat,
    )
    task_vocabulary.check_fits(task.output_features, network.vocab_size)
    if in_chat or not task_vocabulary.has_chat():
      task_vocabulary.check_special(
        task.output_features, network.eos_id, network.begin_id
      )

  def batches(
    self, examples: sources.Examples, network: api.Network, batch_size: int
  ) -> Iterator[sources.Batch]:
    """See `sources.Source`."""
    from dst_t5x.data import pipeline

    return pipeline.eval_batches(
      _find(examples.task),
      examples.feature_lengths,
      batch_size,
      network.feature_converter(pack=False),
      examples.split,
      examples.num_examples,
    )

  def counts_bytes(self, examples: sources.Examples) -> bool:
    """See `sources.Source`."""
    from dst_t5x.data import task_checks

    return examples.num_examples is None and task_checks.counts_bytes(
      _find(examples.task), examples.split
    )

  def bytes_of(self, examples: sources.Examples) -> int | None:
    """See `sources.Source`."""
    from dst_t5x.data import task_checks

    if not self.counts_bytes(examples):
      return None
    return task_checks.bytes_of(_find(examples.task), examples.split)

  def metrics(
    self, examples: sources.Examples, network: api.Network
  ) -> list[str]:
    """See `sources.Source`."""
    from dst_t5x.engine import task_scores

    return task_scores.rehearse(
      examples.task,
      examples.split,
      examples.feature_lengths,
      network,
      min(2, examples.num_examples or 2),
    )

  def scorer(
    self,
    examples: sources.Examples,
    network: api.Network,
    predict: sources.Predict,
    output_dir: str,
  ) -> sources.Scorer:
    """See `sources.Source`."""
    from dst_t5x.engine import task_scores

    return task_scores.TaskEvaluator(
      examples.task,
      examples.split,
      examples.feature_lengths,
      network,
      predict,
      output_dir,
      examples.num_examples,
    )


def _find(task: str) -> 'task_examples.Task':
  from dst_t5x.data import task_checks

  return task_checks.find(task)


LIVE = Live()
