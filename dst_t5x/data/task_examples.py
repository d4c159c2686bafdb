"""Single examples of a seqio task."""

from collections.abc import Iterator, Mapping
import functools
from typing import Any, TypeAlias

from dst_t5x.runtime import quiet_tensorflow  # noqa: F401

# isort: split
import gin
import numpy as np
import seqio
import tensorflow as tf
import tensorflow_datasets as tfds

# TensorFlow only reads data; JAX uses the accelerators.
tf.config.set_visible_devices([], 'GPU')
# Every saved position would include a cache in memory.
seqio.set_tfds_read_config_override(tfds.ReadConfig(try_autocache=False))

Task: TypeAlias = seqio.Task | seqio.Mixture
FEATURES = ('inputs', 'targets')


def tasks_of(task: Task) -> list[seqio.Task]:
  """Returns the tasks of a mixture, or a list of the task itself."""
  return list(task.tasks) if isinstance(task, seqio.Mixture) else [task]


def read(
  task: Task,
  feature_lengths: Mapping[str, int],
  split: str,
  converter: seqio.FeatureConverter | None = None,
  random_seed: int | None = None,
  shard: seqio.ShardInfo | None = None,
) -> tf.data.Dataset:
  """Returns single examples, shuffled and repeated if there is a random seed.

  Args:
    task: a task or mixture.
    feature_lengths: feature of the task -> maximum length; longer ones are cut.
    split: the split.
    converter: makes the model's features; None returns the task's features.
    random_seed: determines the order. None reads the examples once, in order.
    shard: the part of the data to read; all of it by default.
  """
  lengths = {feature: feature_lengths[feature] for feature in FEATURES}
  arguments = task, tuple(lengths.items()), split, random_seed, shard
  if random_seed is None:
    # Another vocabulary or file makes other examples of the same task.
    dataset = _remembered(gin.config_str(), *arguments)
  else:
    dataset = _dataset(*arguments)
  if converter is None:
    return dataset
  return converter(dataset, task_feature_lengths=lengths)


def read_whole(
  task: seqio.Task, feature_lengths: Mapping[str, int], split: str
) -> tf.data.Dataset:
  """Returns the examples of a task, in order, with all features and not cut.

  Args:
    task: the task.
    feature_lengths: feature of the task -> the length to which others cut it.
    split: the split.
  """
  return task.get_dataset(
    dict(feature_lengths),
    split=split,
    shuffle=False,
    try_in_mem_cache=False,
    trim_output_features=False,
  )


def texts_of(
  task: seqio.Task, feature_lengths: Mapping[str, int], split: str
) -> Iterator[dict[str, Any]]:
  """Yields the texts of each example, in order.

  Args:
    task: the task.
    feature_lengths: feature of the task -> maximum length; longer ones are cut.
    split: the split.

  Yields:
    `inputs`, `targets` and lists of texts such as `references`, as far as the
    task has them; and `tokens`, the inputs as an evaluation has them.
  """
  dataset = task.get_dataset(
    dict(feature_lengths), split=split, shuffle=False, try_in_mem_cache=False
  )
  for example in dataset.as_numpy_iterator():
    texts: dict[str, Any] = {
      name: example[f'{name}_pretokenized'].decode()
      for name in FEATURES
      if f'{name}_pretokenized' in example
    }
    for name, value in example.items():
      if isinstance(value, np.ndarray) and value.dtype == object:
        texts[name] = [text.decode() for text in value.flat]
    # Truncated, with the end token, as in an evaluation.
    yield texts | {'tokens': example['inputs']}


def _dataset(
  task: Task,
  feature_lengths: tuple[tuple[str, int], ...],
  split: str,
  random_seed: int | None,
  shard: seqio.ShardInfo | None,
) -> tf.data.Dataset:
  training = random_seed is not None
  return (_without_texts(task) if training else task).get_dataset(
    dict(feature_lengths),
    split=split,
    shuffle=training,
    seed=random_seed,
    shard_info=shard,
    num_epochs=None if training else 1,
    try_in_mem_cache=False,
  )


@functools.lru_cache(maxsize=8)
def _remembered(bindings: str, *arguments: Any) -> tf.data.Dataset:
  """Returns `_dataset` with gin's bindings; TensorFlow builds it slowly."""
  del bindings
  return _dataset(*arguments)


def _without_texts(task: Task) -> Task:
  """Returns the task with the features that training uses, without texts.

  Positions include the shuffle buffers; texts would double their size.
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
