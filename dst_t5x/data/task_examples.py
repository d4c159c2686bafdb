"""From a seqio task to single examples, as the model takes them."""

from collections.abc import Mapping, Sequence
import functools
from typing import Any, TypeAlias

from dst_t5x.runtime import quiet_tensorflow  # noqa: F401

# isort: split
import seqio
import tensorflow as tf
import tensorflow_datasets as tfds

# TensorFlow only reads data; the accelerators are JAX's.
tf.config.set_visible_devices([], 'GPU')
# A cache in memory would become part of every saved position.
seqio.set_tfds_read_config_override(tfds.ReadConfig(try_autocache=False))

Task: TypeAlias = seqio.Task | seqio.Mixture
FEATURES = ('inputs', 'targets')


def tasks_of(task: Task) -> list[seqio.Task]:
  """Returns the tasks of a mixture, or the task itself."""
  return list(task.tasks) if isinstance(task, seqio.Mixture) else [task]


def read(
  task: Task,
  feature_lengths: Mapping[str, int],
  split: str,
  pack: bool = False,
  seed: int | None = None,
  prefix: Sequence[int] = (),
  shard: seqio.ShardInfo | None = None,
) -> tf.data.Dataset:
  """Returns single model examples: shuffled forever, or once without a seed."""
  lengths = tuple((feature, feature_lengths[feature]) for feature in FEATURES)
  make = _remembered if seed is None else _dataset
  return make(task, lengths, split, pack, seed, tuple(prefix), shard)


def _dataset(
  task: Task,
  feature_lengths: tuple[tuple[str, int], ...],
  split: str,
  pack: bool,
  seed: int | None,
  prefix: Sequence[int],
  shard: seqio.ShardInfo | None,
) -> tf.data.Dataset:
  lengths = dict(feature_lengths)
  training = seed is not None
  dataset = (_without_texts(task) if training else task).get_dataset(
    lengths,
    split=split,
    shuffle=training,
    seed=seed,
    shard_info=shard,
    num_epochs=None if training else 1,
    try_in_mem_cache=False,
  )
  converter = FeatureConverter(prefix, pack=pack)
  return converter(dataset, task_feature_lengths=lengths)


# What is evaluated; TensorFlow builds it slowly.
_remembered = functools.lru_cache(maxsize=8)(_dataset)


class FeatureConverter(seqio.EncDecFeatureConverter):
  """T5's features, with a prefix before the inputs of every example.

  The prefix comes on top of the inputs' length, and each example of a packed
  row has its own.
  """

  def __init__(self, prefix: Sequence[int] = (), **options: Any) -> None:
    """Takes the ids of the prefix; see `adapters.Adapter.prefix`."""
    super().__init__(**options)
    self._prefix = tuple(prefix)

  def _longer(self, lengths: Mapping[str, int]) -> dict[str, int]:
    return {**lengths, 'inputs': lengths['inputs'] + len(self._prefix)}

  def _convert_features(
    self, ds: tf.data.Dataset, task_feature_lengths: Mapping[str, int]
  ) -> tf.data.Dataset:
    if not self._prefix:
      return super()._convert_features(ds, task_feature_lengths)

    def put_before(example: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
      prefix = tf.constant(self._prefix, example['inputs'].dtype)
      return {**example, 'inputs': tf.concat([prefix, example['inputs']], 0)}

    return super()._convert_features(
      ds.map(put_before), self._longer(task_feature_lengths)
    )

  def get_model_feature_lengths(
    self, task_feature_lengths: Mapping[str, int]
  ) -> Mapping[str, int]:
    """Returns the lengths of the model's features."""
    return super().get_model_feature_lengths(self._longer(task_feature_lengths))


def _without_texts(task: Task) -> Task:
  """Returns the task without what is not learnt from.

  Shuffle buffers are part of every position; texts would double them.
  """
  if isinstance(task, seqio.Task):
    return task.replace(preprocessors=[*task.preprocessors, _keep_features])
  return seqio.Mixture(
    task.name,
    [(_without_texts(member), task.get_rate(member)) for member in task.tasks],
    sample_fn=task._sample_fn,
  )


def _keep_features(dataset: tf.data.Dataset) -> tf.data.Dataset:
  return dataset.map(lambda example: {name: example[name] for name in FEATURES})
