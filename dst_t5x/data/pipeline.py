"""Batches on the device, from a seqio task.

    task = task_checks.check('gsm8k', lengths, batch_size=128)
    converter = network.feature_converter(pack=True)
    with TrainIterator(
      task, lengths, 128, converter, random_seed=0
    ) as batches:
      for step, batch, position in batches: ...

The order of the training batches depends on the random seed only. A `position`
is the state of the whole input pipeline, shuffle buffers included. A run that
starts from it reads the same batches as the run that saved it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import queue
import threading
from typing import Any, Self, TypeAlias

from dst_t5x.runtime import quiet_tensorflow  # noqa: F401

# isort: split
from absl import logging
import numpy as np
import seqio
import tensorflow as tf

from dst_t5x.core.errors import UserError
from dst_t5x.data import data_position
from dst_t5x.data import pipeline_state
from dst_t5x.data import task_examples

TrainItem = data_position.TrainItem
Batch: TypeAlias = Mapping[str, np.ndarray]


def eval_batches(
  task: task_examples.Task,
  feature_lengths: Mapping[str, int],
  batch_size: int,
  converter: seqio.FeatureConverter,
  split: str = 'validation',
  num_examples: int | None = None,
) -> Iterator[Batch]:
  """Yields the examples of a split once and in order, for teacher forcing.

  Args:
    task: a task, or a mixture whose tasks are read one after another.
    feature_lengths: pieces per example; longer examples are cut.
    batch_size: rows of every batch; the last is padded with rows of zeros.
    converter: makes the model's features; does not pack.
    split: the split. Tasks of a mixture without it are skipped.
    num_examples: the largest number of examples of each task; None for all.

  Yields:
    Model features as numpy arrays `[batch_size, length]`.
  """
  dataset, *others = [
    task_examples.read(member, feature_lengths, split, converter).take(
      num_examples or -1
    )
    for member in task_examples.tasks_of(task)
    if split in member.splits
  ]
  for other in others:
    dataset = dataset.concatenate(other)
  for batch in dataset.batch(batch_size).as_numpy_iterator():
    yield {name: _pad_rows(rows, batch_size) for name, rows in batch.items()}


def _pad_rows(rows: np.ndarray, count: int) -> np.ndarray:
  return np.pad(rows, ((0, count - len(rows)), (0, 0)))


def _iterator(
  dataset: tf.data.Dataset, position: bytes | None
) -> tf.data.Iterator:
  """Returns an iterator that begins at a position."""
  if position is None:
    return iter(dataset)
  count = data_position.count_of(position)
  if count is not None:
    # tf.data reads and drops these batches; the order is always the same.
    return iter(dataset.skip(count))
  source = iter(dataset)
  pipeline_state.restore(source, position)
  return source


class TrainIterator:
  """Endless training batches, which a thread reads ahead.

  Iterating yields `TrainItem`s. An exception of the thread is raised in the
  iterating thread. `close`, or the end of the context, ends the thread.
  """

  def __init__(
    self,
    task: task_examples.Task,
    feature_lengths: Mapping[str, int],
    batch_size: int,
    converter: seqio.FeatureConverter,
    *,
    random_seed: int,
    split: str = 'train',
    step: int = 0,
    position: bytes | None = None,
    save_after: Callable[[int], bool] = lambda step: False,
    place: Callable[[Batch], Any] = lambda batch: batch,
    prefetch: int = 2,
    num_shards: int = 1,
    rows: np.ndarray | None = None,
  ) -> None:
    """Starts reading.

    Args:
      task: the checked task or mixture.
      feature_lengths: pieces per (packed) example.
      batch_size: (packed) examples of a batch.
      converter: makes the model's features, packed or not.
      random_seed: determines the order.
      split: the split to read.
      step: training steps already done; the first item has the next number.
      position: the position saved after that step; None for the start.
      save_after: returns whether the item of a step must have its position.
      place: called in the thread on every numpy batch, for example to put it
        on the device.
      prefetch: number of batches kept ready.
      num_shards: number of shards of the data. Each fills its share of the rows
        of every batch, in the order of the shards.
      rows: bool [batch_size], which rows are needed. Shards without a needed
        row are not read; their rows are zeros.
    """
    self._num_shards = num_shards
    self._share = batch_size // num_shards
    positions: dict[int, bytes | None] = {0: position}
    if num_shards > 1:
      needed = [
        shard
        for shard in range(num_shards)
        if rows is None
        or rows[shard * self._share : (shard + 1) * self._share].any()
      ]
      positions = dict.fromkeys(needed)
      if position is not None:
        positions |= data_position.unpack(position, needed)

    def read(shard: int) -> tf.data.Dataset:
      info = seqio.ShardInfo(shard, num_shards) if num_shards > 1 else None
      dataset = task_examples.read(
        task, feature_lengths, split, converter, random_seed, info
      )
      return dataset.batch(self._share, drop_remainder=True)

    self._sources = {
      shard: _iterator(read(shard), at) for shard, at in positions.items()
    }
    self._step = step
    self._only_counted = False
    self._save_after = save_after
    self._place = place
    self._items: queue.Queue[TrainItem | BaseException] = queue.Queue(prefetch)
    self._closed = threading.Event()
    self._thread = threading.Thread(
      target=self._produce, name='train-data', daemon=True
    )
    self._thread.start()

  def __iter__(self) -> Self:
    return self

  def __next__(self) -> TrainItem:
    if self._closed.is_set():
      raise StopIteration
    item = self._items.get()
    if isinstance(item, BaseException):
      self.close()
      raise item
    return item

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *unused: Any) -> None:
    self.close()

  def close(self) -> None:
    """Ends the thread; iterating afterwards stops at once."""
    self._closed.set()
    self._thread.join()
    # A Python function in the pipeline must not outlive the interpreter.
    self._sources = {}

  def _produce(self) -> None:
    try:
      for features in zip(*self._sources.values(), strict=True):
        self._step += 1
        batch = self._join(features)
        # The pipeline has this state only until it makes the next batch.
        wanted = self._save_after(self._step)
        position = self._position() if wanted else None
        self._put(TrainItem(self._step, self._place(batch), position))
        if self._closed.is_set():
          return
      raise UserError('the training data ended, though it should repeat')
    except BaseException as error:
      self._put(error)

  def _join(self, parts: Sequence[Mapping[str, tf.Tensor]]) -> Batch:
    """Returns the batch that consists of the shards' rows."""
    if self._num_shards == 1:
      return {name: rows.numpy() for name, rows in parts[0].items()}
    batch = {
      name: np.zeros((self._num_shards, *rows.shape), rows.dtype.as_numpy_dtype)
      for name, rows in parts[0].items()
    }
    for shard, part in zip(self._sources, parts, strict=True):
      for name, rows in part.items():
        batch[name][shard] = rows.numpy()
    return {
      name: rows.reshape(-1, *rows.shape[2:]) for name, rows in batch.items()
    }

  def _position(self) -> bytes:
    """Returns the state of the pipelines of all shards."""
    if self._num_shards == 1:
      return self._position_of(self._sources[0])
    return data_position.pack(
      {
        shard: self._position_of(source)
        for shard, source in self._sources.items()
      }
    )

  def _position_of(self, source: tf.data.Iterator) -> bytes:
    """Returns the state of a pipeline, or the number of batches it has made."""
    if not self._only_counted:
      try:
        return pipeline_state.save(source)
      except (tf.errors.FailedPreconditionError, tf.errors.UnimplementedError):
        self._only_counted = True
        logging.warning(
          'TensorFlow cannot save the state of this input pipeline (a Python '
          'function is part of it): to resume, all batches are read again'
        )
    return data_position.counted(self._step)

  def _put(self, item: TrainItem | BaseException) -> None:
    while not self._closed.is_set():
      try:
        return self._items.put(item, timeout=0.1)
      except queue.Full:
        continue
