"""Downloads and prepares the data of a task."""

import os
import pathlib
import stat
import sys
from typing import Any

from dst_t5x.core import data_folders
from dst_t5x.runtime import quiet_tensorflow  # noqa: F401

# isort: split
from absl import logging
import seqio
import tensorflow_datasets as tfds
from tensorflow_datasets.core.download import downloader
import tqdm

from dst_t5x.core.errors import UserError, first_line
from dst_t5x.data import task_checks
from dst_t5x.data import task_examples
from dst_t5x.data import task_vocabulary
from dst_t5x.data import vocabulary

# TFDS's default of 10 takes minutes without a network.
_TRIES = 4


def prepare_data(task: str) -> None:
  """Downloads and prepares the data of a task, or of the tasks of a mixture.

  Data that is already there stays as it is.

  Args:
    task: a registered seqio task or mixture.

  Raises:
    UserError: there is no such task, or its data cannot be downloaded, prepared
      or written.
  """
  members = task_examples.tasks_of(task_checks.find(task))
  downloader.MAX_RETRIES = _TRIES
  if not sys.stderr.isatty():
    tfds.disable_progress_bar()
  for member in (bar := tqdm.tqdm(members, 'tasks', disable=None)):
    bar.set_postfix_str(member.name)
    _prepare(member)
    counts = ', '.join(f'{s} {_count(member, s)}' for s in member.splits)
    logging.info('%s: %s', member.name, counts)
  place = task_vocabulary.fetch()
  logging.info('vocabulary: %s', place)
  if place == vocabulary.PUBLIC_PATH:
    logging.warning(
      'it is read there at every start: set %s or %s to keep a copy',
      data_folders.DATA_DIR_VARIABLE,
      vocabulary.VOCABULARY_VARIABLE,
    )
  if folder := data_folders.shared_folder():
    if not data_folders.is_remote(folder):
      _let_others_read(pathlib.Path(folder))
    logging.info(
      'anyone may use it with %s=%s', data_folders.DATA_DIR_VARIABLE, folder
    )


def _prepare(task: seqio.Task) -> None:
  """Prepares the data of one task through TFDS or through its own source."""
  builder = task_checks.tfds_builder(task)
  try:
    if builder is not None:
      # Looking for prepared data in the cloud takes minutes without a network.
      builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(try_download_gcs=False)
      )
    getattr(task.source, 'prepare', lambda: None)()
  except UserError:
    raise
  except Exception as error:  # Errors of the network, TFDS or the disk.
    where = f' into {os.fspath(builder.data_path)!r}' if builder else ''
    raise UserError(
      f'cannot prepare the data of task {task.name!r}{where}:'
      f' {first_line(error)}'
    ) from error


def _count(task: seqio.Task, split: str) -> Any:
  """Returns the number of examples before preprocessing."""
  count = task.num_input_examples(split)
  return '?' if count is None else f'{count:,}'


def _let_others_read(folder: pathlib.Path) -> None:
  """Makes a folder's content readable for everyone, whatever the umask was."""
  for path in (folder, *folder.rglob('*')):
    mode = path.stat().st_mode
    readable = stat.S_IRGRP | stat.S_IROTH
    if path.is_dir():
      readable |= stat.S_IXGRP | stat.S_IXOTH
    if mode & readable != readable:
      try:
        path.chmod(mode | readable)
      except PermissionError:  # The file is another user's.
        logging.warning('%s is not ours: its mode stays %o', path, mode)
