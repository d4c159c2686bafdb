"""From a seqio task to batches on the device.

    task = check('gsm8k', {'inputs': 256, 'targets': 320}, batch_size=128)
    with TrainIterator(task, lengths, 128, seed=0, place=place) as batches:
      for step, batch, position in batches: ...

The order of training batches depends on the seed alone, and a `position` (the
state of the whole input pipeline, shuffle buffers included) continues it where
it was, batch for batch the same.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import functools
import os
import queue
import threading
from typing import Any, NamedTuple, Self, TypeAlias

from dst_t5x import quiet_tensorflow  # noqa: F401

# isort: split
from absl import logging
import numpy as np
import seqio
import tensorflow as tf
import tensorflow_datasets as tfds

from dst_t5x import data_position
from dst_t5x.errors import UserError, check_positive, first_line, nearest
from dst_t5x.tasks import vocabulary

# TensorFlow only reads data; the accelerators are JAX's.
tf.config.set_visible_devices([], 'GPU')
# A cache in memory would become part of every saved position.
seqio.set_tfds_read_config_override(tfds.ReadConfig(try_autocache=False))

Batch = Mapping[str, np.ndarray]
Task: TypeAlias = seqio.Task | seqio.Mixture
FEATURES = ('inputs', 'targets')
# Begins a position that is the number of batches, not the pipeline's state.
_COUNT = b'batches '


class TrainItem(NamedTuple):
  """One training batch.

  Attributes:
    step: the training step that consumes the batch; the first is 1.
    batch: model features, `[batch, length]` each, as `place` returned them.
    position: the pipeline's state after this batch, where it was asked for.
  """

  step: int
  batch: Any
  position: bytes | None


def check(
  name: str,
  feature_lengths: Mapping[str, int],
  batch_size: int,
  split: str | None = 'train',
) -> Task:
  """Returns the task or mixture called `name`, known to be usable.

  Reads the vocabulary and one example, so that whatever is missing is missed
  before the model is built.

  Args:
    name: of a registered seqio task or mixture.
    feature_lengths: pieces per example, `{'inputs': …, 'targets': …}`.
    batch_size: examples (packed ones where packing is on) of a batch.
    split: the split to be read; None if only the vocabulary is needed.

  Raises:
    UserError: what is missing or wrong, and the remedy.
  """
  check_positive('BATCH_SIZE', batch_size)
  task = find(name)
  check_features(task, feature_lengths)
  if split is None:
    return task
  members = [m for m in tasks_of(task) if split in _splits(m)]
  if not members:
    splits = {split for m in tasks_of(task) for split in m.splits}
    raise UserError(
      f'task {name!r} has no split {split!r}; it has {sorted(splits)}'
    )
  for member in members:
    check_prepared(member)
    check_source(member, split)
    _check_first_example(member, feature_lengths, split)
  return task


def check_features(task: Task, feature_lengths: Mapping[str, int]) -> None:
  """Checks that a task's features have lengths, and loads its vocabulary.

  Raises:
    UserError: what is missing or wrong, and the remedy.
  """
  for feature in FEATURES:
    if feature not in task.output_features:
      raise UserError(
        f'task {task.name!r} has no feature {feature!r}; it has'
        f' {sorted(task.output_features)}'
      )
    if feature_lengths.get(feature, 0) <= 0:
      raise UserError(
        f'TASK_FEATURE_LENGTHS gives no positive length for {feature!r};'
        f' it is {dict(feature_lengths)}'
      )
    vocabulary.check(task.output_features[feature].vocabulary)


def tasks_of(task: Task) -> list[seqio.Task]:
  """Returns the tasks of a mixture, or the task itself."""
  return list(task.tasks) if isinstance(task, seqio.Mixture) else [task]


def find(name: str) -> Task:
  """Returns the task or mixture called `name`.

  Raises:
    UserError: there is none, and which name is nearest.
  """
  known = set(seqio.TaskRegistry.names()) | set(seqio.MixtureRegistry.names())
  if name not in known:
    raise UserError(
      f'no seqio task or mixture is called {name!r}{nearest(name, known)}'
      " (is its module imported by the task's gin file?)"
    )
  return seqio.get_mixture_or_task(name)


def tfds_builder(task: seqio.Task) -> tfds.core.DatasetBuilder | None:
  """Returns what prepares and reads a task's TFDS data, None if it has none.

  Raises:
    UserError: TFDS does not know the data set.
  """
  source = task.source
  if not isinstance(source, seqio.TfdsDataSource) or not (
    source.tfds_dataset.name
  ):
    return None
  try:
    return source.tfds_dataset.builder
  except Exception as error:
    raise UserError(
      f'TFDS cannot load {source.tfds_dataset.name!r} of task {task.name!r}:'
      f' {first_line(error)}'
    ) from error


def check_prepared(task: seqio.Task) -> None:
  """Raises UserError where a TFDS source has no prepared data."""
  builder = tfds_builder(task)
  if builder is not None and not builder.is_prepared():
    raise UserError(
      f'the data of task {task.name!r} is not prepared in'
      f' {os.fspath(builder.data_path)!r}; set TFDS_DATA_DIR to the folder that'
      ' has it, or prepare it there with `python -m dst_t5x.prepare_data'
      f' {task.name}`'
    )


def _splits(task: seqio.Task) -> Iterable[str]:
  """Returns the task's splits, of which TFDS may know nothing yet.

  Raises:
    UserError: nothing says them, as the data is not prepared.
  """
  if isinstance(task.source, seqio.TfdsDataSource) and not task.source._splits:
    check_prepared(task)
  return task.splits


def check_source(task: seqio.Task, split: str) -> None:
  """Lets a source of ours look through the data that is about to be used.

  Raises:
    UserError: the data is missing or damaged.
  """
  getattr(task.source, 'check', lambda split: None)(split)


def _check_first_example(
  task: seqio.Task, feature_lengths: Mapping[str, int], split: str
) -> None:
  """Raises UserError where no example of the split can be read."""
  try:
    dataset = _examples(task, feature_lengths, split)
    found = next(dataset.take(1).as_numpy_iterator(), None)
  except UserError:
    raise
  except Exception as error:
    raise UserError(
      f'cannot read the {split} split of task {task.name!r}:'
      f' {first_line(error)}'
    ) from error
  if found is None:
    raise UserError(f'the {split} split of task {task.name!r} has no example')


def _examples(
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


def eval_batches(
  task: Task,
  feature_lengths: Mapping[str, int],
  batch_size: int,
  split: str = 'validation',
  num_examples: int | None = None,
  prefix: Sequence[int] = (),
) -> Iterator[Batch]:
  """Yields the examples of a split once and in order, for teacher forcing.

  Args:
    task: a task, or a mixture, whose tasks then follow each other.
    feature_lengths: pieces per example; longer examples are cut.
    batch_size: rows of every batch; the last is padded with rows of zeros,
      whose `decoder_loss_weights` are 0.
    split: the split; tasks of a mixture that lack it are left out.
    num_examples: at most so many examples, of each task.
    prefix: ids that are put before the inputs of each example.

  Yields:
    Model features as numpy arrays `[batch_size, length]`.
  """
  dataset, *others = [
    _examples(member, feature_lengths, split, prefix=prefix).take(
      num_examples or -1
    )
    for member in tasks_of(task)
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
  if position is not None and position.startswith(_COUNT):
    # tf.data reads and drops them: the order is always the same.
    dataset = dataset.skip(int(position.removeprefix(_COUNT)))
    position = None
  source = iter(dataset)
  if position is not None:
    data_position.restore(source, position)
  return source


class TrainIterator:
  """Training batches without end, read ahead by a thread.

  Iterate over it for `TrainItem`s; an exception of the thread is raised to the
  consumer. Close it, or use it as a context manager, to end the thread.
  """

  def __init__(
    self,
    task: Task,
    feature_lengths: Mapping[str, int],
    batch_size: int,
    *,
    seed: int,
    pack: bool = True,
    split: str = 'train',
    step: int = 0,
    position: bytes | None = None,
    save_after: Callable[[int], bool] = lambda step: False,
    place: Callable[[Batch], Any] = lambda batch: batch,
    prefetch: int = 2,
    prefix: Sequence[int] = (),
    num_shards: int = 1,
    rows: np.ndarray | None = None,
  ) -> None:
    """Starts reading.

    Args:
      task: the checked task or mixture.
      feature_lengths: pieces per (packed) example.
      batch_size: (packed) examples of a batch.
      seed: determines the order.
      pack: whether short examples share one row, told apart by segment ids.
      split: the split to read.
      step: training steps already done; the first item has the next number.
      position: the position saved after that step, or None for the start.
      save_after: whether the item of this step must carry its position.
      place: called in the thread on every numpy batch, for instance to put it
        on the device.
      prefetch: batches kept ready.
      prefix: ids that are put before the inputs of each example.
      num_shards: parts of the data, each of which fills its share of the rows
        of every batch, one after the other.
      rows: bool [batch_size], which rows are needed; shards that fill none of
        them are not read, and their rows are zeros.
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
      dataset = _examples(
        task, feature_lengths, split, pack, seed, prefix, info
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
    # Now: a Python function in the pipeline must not outlive the interpreter.
    self._sources = {}

  def _produce(self) -> None:
    try:
      for features in zip(*self._sources.values(), strict=True):
        self._step += 1
        batch = self._join(features)
        # The pipeline stands right behind this batch only until the next one.
        wanted = self._save_after(self._step)
        position = self._position() if wanted else None
        self._put(TrainItem(self._step, self._place(batch), position))
        if self._closed.is_set():
          return
      raise UserError('the training data ended, though it should repeat')
    except BaseException as error:
      self._put(error)

  def _join(self, parts: Sequence[Mapping[str, tf.Tensor]]) -> Batch:
    """Returns a batch of what each shard has for it."""
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
    """Returns where the pipeline of each shard stands."""
    if self._num_shards == 1:
      return self._position_of(self._sources[0])
    return data_position.pack(
      {
        shard: self._position_of(source)
        for shard, source in self._sources.items()
      }
    )

  def _position_of(self, source: tf.data.Iterator) -> bytes:
    """Returns a pipeline's state, or how many batches it has given."""
    if not self._only_counted:
      try:
        return data_position.save(source)
      except (tf.errors.FailedPreconditionError, tf.errors.UnimplementedError):
        self._only_counted = True
        logging.warning(
          'TensorFlow cannot save the state of this input pipeline (a Python '
          'function is part of it): to resume, all batches are read again'
        )
    return _COUNT + str(self._step).encode()

  def _put(self, item: TrainItem | BaseException) -> None:
    while not self._closed.is_set():
      try:
        return self._items.put(item, timeout=0.1)
      except queue.Full:
        continue
