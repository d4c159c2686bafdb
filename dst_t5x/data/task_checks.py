"""Checks that a seqio task can be used, before anything is built."""

from collections.abc import Iterable, Mapping
import os
from typing import Any

from dst_t5x.runtime import quiet_tensorflow  # noqa: F401

# isort: split
from absl import logging
from etils import epath
import seqio
import tensorflow_datasets as tfds

from dst_t5x.core.errors import UserError, check_positive, first_line, nearest
from dst_t5x.data import task_examples
from dst_t5x.data import task_vocabulary

_FIRST = 64  # Examples that are measured before a run.


def check(
  name: str,
  feature_lengths: Mapping[str, int],
  batch_size: int,
  split: str | None = 'train',
  in_chat: bool = True,
) -> task_examples.Task:
  """Returns the task or mixture called `name` after checking it.

  Reads the vocabulary and the first examples, so that missing data is reported
  before the model is built, and that the log says whether rows will be cut.

  Args:
    name: the name of a registered seqio task or mixture.
    feature_lengths: pieces per example, `{'inputs': …, 'targets': …}`.
    batch_size: examples of a batch (packed examples if packing is on).
    split: the split that will be read; None to check the vocabulary only.
    in_chat: whether a chat template, if there is one, must have an effect.

  Raises:
    UserError: something is missing or wrong; names the remedy.
  """
  check_positive('BATCH_SIZE', batch_size)
  task = find(name)
  check_features(task, feature_lengths, in_chat)
  if split is None:
    return task
  members = [m for m in task_examples.tasks_of(task) if split in _splits(m)]
  if not members:
    splits = {split for m in task_examples.tasks_of(task) for split in m.splits}
    raise UserError(
      f'task {name!r} has no split {split!r}; it has {sorted(splits)}'
    )
  for member in members:
    check_prepared(member)
    check_source(member, split)
    _check_first_examples(member, feature_lengths, split)
  return task


def check_features(
  task: task_examples.Task,
  feature_lengths: Mapping[str, int],
  in_chat: bool = True,
) -> None:
  """Checks that a task's features have lengths, and loads its vocabulary.

  Arguments as in `check`.

  Raises:
    UserError: something is missing or wrong; names the remedy.
  """
  for feature in task_examples.FEATURES:
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
    task_vocabulary.check(task.output_features[feature].vocabulary)
  if in_chat:
    task_vocabulary.check_chat(task.name, task.output_features)


def find(name: str) -> task_examples.Task:
  """Returns the task or mixture called `name`.

  Raises:
    UserError: there is none; names the nearest name.
  """
  known = set(seqio.TaskRegistry.names()) | set(seqio.MixtureRegistry.names())
  if name not in known:
    raise UserError(
      f'no seqio task or mixture is called {name!r}{nearest(name, known)}'
      " (is its module imported by the task's gin file?)"
    )
  return seqio.get_mixture_or_task(name)


def tfds_builder(task: seqio.Task) -> tfds.core.DatasetBuilder | None:
  """Returns the TFDS builder of a task's data; None if it has none.

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
  """Raises UserError if the data of a TFDS source is not prepared."""
  builder = tfds_builder(task)
  if builder is not None and not builder.is_prepared():
    raise UserError(
      f'the data of task {task.name!r} is not prepared in'
      f' {os.fspath(builder.data_path)!r}; set TFDS_DATA_DIR to the folder that'
      ' has it, or prepare it there with `python -m dst_t5x.prepare_data'
      f' {task.name}`'
    )


def _splits(task: seqio.Task) -> Iterable[str]:
  """Returns the names of a task's splits.

  Raises:
    UserError: TFDS does not know them because the data is not prepared.
  """
  if isinstance(task.source, seqio.TfdsDataSource) and not task.source._splits:
    check_prepared(task)
  return task.splits


def check_source(task: seqio.Task, split: str) -> None:
  """Checks the data of a split, if the task's source has a method for it.

  Raises:
    UserError: the data is missing or damaged.
  """
  getattr(task.source, 'check', lambda split: None)(split)


def rows_of(task: task_examples.Task, split: str) -> dict[str, Any]:
  """Returns the identity of a split's rows, where it is known.

  A resumed run compares it to notice that data has changed.

  Args:
    task: a checked task or mixture.
    split: one of its splits.

  Returns:
    JSON: task -> the result of its source's `rows_of`, or for plain files their
    names and sizes in bytes. Tasks with other sources are left out.
  """
  identities: dict[str, Any] = {}
  for member in task_examples.tasks_of(task):
    source = member.source
    if split not in member.splits:
      continue
    if hasattr(source, 'rows_of'):
      identities[member.name] = source.rows_of(split)
    elif isinstance(source, seqio.FileDataSource):
      files = [epath.Path(path) for path in source.list_shards(split)]
      identities[member.name] = {
        file.name: file.stat().length for file in files
      }
  return identities


def counts_bytes(task: task_examples.Task, split: str) -> bool:
  """Returns whether all sources of a split can tell their texts' bytes.

  Args:
    task: a checked task or mixture.
    split: one of its splits.
  """
  return all(hasattr(source, 'bytes_of') for source in _sources(task, split))


def bytes_of(task: task_examples.Task, split: str) -> int | None:
  """Returns the bytes of the texts that a split is made of; reads them.

  Args:
    task: a checked task or mixture.
    split: one of its splits.

  Returns:
    What the sources' `bytes_of` return; None without `counts_bytes`.
  """
  if not counts_bytes(task, split):
    return None
  return sum(source.bytes_of(split) for source in _sources(task, split))


def _sources(task: task_examples.Task, split: str) -> list[Any]:
  return [
    member.source
    for member in task_examples.tasks_of(task)
    if split in member.splits
  ]


def _check_first_examples(
  task: seqio.Task, feature_lengths: Mapping[str, int], split: str
) -> None:
  """Reads the first examples of a split, and warns if some will be cut.

  Raises:
    UserError: no example can be read.
  """
  try:
    first = list(
      task_examples.read_whole(task, feature_lengths, split)
      .take(_FIRST)
      .as_numpy_iterator()
    )
  except UserError:
    raise
  except Exception as error:
    raise UserError(
      f'cannot read the {split} split of task {task.name!r}:'
      f' {first_line(error)}'
    ) from error
  if not first:
    raise UserError(f'the {split} split of task {task.name!r} has no example')
  for name in task_examples.FEATURES:
    lengths = [len(example[name]) for example in first]
    if cut := sum(length > feature_lengths[name] for length in lengths):
      logging.warning(
        'task %s, %s: TASK_FEATURE_LENGTHS = %d cuts the end of the %s of %d of'
        ' the first %d examples; the longest has %d pieces',
        *(task.name, split, feature_lengths[name], name, cut, len(first)),
        max(lengths),
      )
