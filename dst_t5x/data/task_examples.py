"""From a seqio task to single examples."""

from collections.abc import Mapping
import functools
from typing import TypeAlias

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
  converter: seqio.FeatureConverter | None = None,
  seed: int | None = None,
  shard: seqio.ShardInfo | None = None,
) -> tf.data.Dataset:
  """Returns single examples: shuffled forever, or once without a seed.

  Args:
    task: a task or mixture.
    feature_lengths: feature of the task -> longest length; longer ones are cut.
    split: which split.
    converter: makes the model's features; without one, the task's are returned.
    seed: determines the order.
    shard: which part of the data; all of it by default.
  """
  lengths = {feature: feature_lengths[feature] for feature in FEATURES}
  make = _remembered if seed is None else _dataset
  dataset = make(task, tuple(lengths.items()), split, seed, shard)
  if converter is None:
    return dataset
  return converter(dataset, task_feature_lengths=lengths)


def _dataset(
  task: Task,
  feature_lengths: tuple[tuple[str, int], ...],
  split: str,
  seed: int | None,
  shard: seqio.ShardInfo | None,
) -> tf.data.Dataset:
  training = seed is not None
  return (_without_texts(task) if training else task).get_dataset(
    dict(feature_lengths),
    split=split,
    shuffle=training,
    seed=seed,
    shard_info=shard,
    num_epochs=None if training else 1,
    try_in_mem_cache=False,
  )


# What is evaluated; TensorFlow builds it slowly.
_remembered = functools.lru_cache(maxsize=8)(_dataset)


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
