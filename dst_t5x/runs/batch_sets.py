"""Stores the batches of a run, for runs without TensorFlow and seqio.

The run's own source makes them: they are those that the run would read. See
`data.batch_files` for the files and `engine.stored` for their reader.
"""

from collections.abc import Callable, Sequence
from typing import Any

from absl import logging
from etils import epath
import tqdm

import dst_t5x
from dst_t5x.config import task_names
from dst_t5x.core import json_text
from dst_t5x.core import object_stores
from dst_t5x.core import values
from dst_t5x.core.errors import UserError, writing
from dst_t5x.data import batch_files
from dst_t5x.data import preparation
from dst_t5x.data import stored_vocabulary
from dst_t5x.data import task_checks
from dst_t5x.data import task_examples
from dst_t5x.data import task_vocabulary
from dst_t5x.data import vocabulary_files
from dst_t5x.engine import evaluation as evaluation_lib
from dst_t5x.engine import sources
from dst_t5x.engine import stored
from dst_t5x.models import api
from dst_t5x.runs import identity
from dst_t5x.runs import plan as plan_lib

_RUN_FILE = 'gin/runs/prepare_batches.gin'


def to_flags(arguments: Sequence[str]) -> list[str]:
  """Returns gin flags: those of training, the task's file, and the folder.

  Args:
    arguments: of the command, with `--batches DIR` or `--batches=DIR`.

  Raises:
    UserError: there is no folder, or no such task.
  """
  rest, folders = [], []
  words = iter(arguments)
  for word in words:
    flag, equals, value = word.partition('=')
    if flag == '--batches':
      folders.append(value if equals else next(words, ''))
    else:
      rest.append(word)
  if len(folders) != 1 or not folders[0]:
    raise UserError('--batches needs one folder: --batches DIR')
  files, others = task_names.split(rest)
  return [
    *(*files, f'--gin_file={_RUN_FILE}'),
    *(*others, f'--gin.BATCHES={folders[0]!r}'),
  ]


def prepare(
  folder: values.Path,
  network: api.Network,
  train_data: sources.TrainData,
  evaluation: evaluation_lib.Evaluation,
  plan: plan_lib.Plan,
  random_seed: values.RandomSeed = 0,
  training: Callable[..., Any] | None = None,
) -> None:
  """Writes the batches of a run.

  Args:
    folder: BATCHES. Whole batches of the same settings in it stay as they are.
    network: whose features to make.
    train_data: the training data.
    evaluation: the settings of the evaluation.
    plan: the number of steps.
    random_seed: RANDOM_SEED.
    training: `training.train`, which gin configures.

  Raises:
    UserError: the task's data is missing or wrong, or the folder has other
      batches or cannot be written.
  """
  path = epath.Path(folder)
  object_stores.check_writable('BATCHES', path)
  train_data.source.check_training(train_data, network)
  evaluation.check(network)
  settings = _settings(train_data, evaluation, plan, random_seed)
  about = _about(train_data, evaluation, network, settings, training)
  if _is_there(path, about):
    logging.info('the batches in %s are there already', path)
    return
  with writing(f'BATCHES {path}'):
    object_stores.make_folder(path)
  about['vocabulary'] = _store_vocabulary(path, train_data.task)
  configuration = about['configuration']
  about[stored.TRAINING] = _store_training(
    path, configuration, train_data, network, plan.train_steps, random_seed
  )
  about[stored.EVALUATION] = _store_examples(
    path, configuration, stored.EVALUATION, evaluation, network
  ) | _store_texts(path, evaluation)
  if held_out := evaluation.held_out:
    networks = {stored.HELD_OUT: network}
    if network != network.base:
      networks[stored.HELD_OUT_BASE] = network.base
    for part, reader in networks.items():
      about[part] = _store_examples(path, configuration, part, held_out, reader)
  batch_files.write_about(path, about)
  logging.info('%d steps in %s', plan.train_steps, path)


def _settings(
  train_data: sources.TrainData,
  evaluation: evaluation_lib.Evaluation,
  plan: plan_lib.Plan,
  random_seed: int,
) -> dict[str, Any]:
  """Returns macro -> value of what the batches depend on."""
  held_out = evaluation.held_out and evaluation.held_out.examples
  return {
    'MIXTURE_OR_TASK_NAME': train_data.task,
    'TASK_FEATURE_LENGTHS': dict(train_data.feature_lengths),
    'BATCH_SIZE': train_data.batch_size,
    'PACK': train_data.pack,
    'DATA_SHARDS': train_data.shards,
    'RANDOM_SEED': random_seed,
    'TRAIN_STEPS': plan.train_steps,
    'EVAL_SPLIT': evaluation.split,
    'EVAL_EXAMPLES': evaluation.num_examples,
    'HELD_OUT_TASK': held_out.task if held_out else None,
    'HELD_OUT_FEATURE_LENGTHS': (
      dict(held_out.feature_lengths) if held_out else None
    ),
    'HELD_OUT_SPLIT': held_out.split if held_out else None,
    'HELD_OUT_EXAMPLES': held_out.num_examples if held_out else None,
  }


def _about(
  train_data: sources.TrainData,
  evaluation: evaluation_lib.Evaluation,
  network: api.Network,
  settings: dict[str, Any],
  training: Callable[..., Any] | None,
) -> dict[str, Any]:
  """Returns what identifies the batches; JSON."""
  said = identity.of(training).settings if training else {}
  splits = {(train_data.task, 'train'), (evaluation.task, evaluation.split)}
  if held_out := evaluation.held_out:
    splits.add((held_out.examples.task, held_out.examples.split))
  about = {
    'version': dst_t5x.__version__,
    'settings': settings,
    'identity': {
      name: said[name] for name in ('task', 'data', 'other') if name in said
    },
    'network': stored.facts_of(network),
    'rows': {
      f'{task}/{split}': train_data.source.rows_of(task, split)
      for task, split in sorted(splits)
    },
  }
  found: dict[str, Any] = json_text.loads(json_text.dumps(about))
  return {'configuration': batch_files.digest(found), **found}


def _is_there(path: epath.Path, about: dict[str, Any]) -> bool:
  """Returns whether the folder has these batches.

  Raises:
    UserError: it has others.
  """
  if not (path / batch_files.FILE).exists():
    return False
  there = batch_files.read_about(path)
  for name, value in json_text.flat(about):
    before = dict(json_text.flat(there)).get(name)
    if name not in ('version', 'configuration') and before != value:
      raise UserError(
        f'BATCHES {path} has batches with {name} = {before!r}, not {value!r}:'
        ' choose another folder, or remove that one'
      )
  for part in (stored.TRAINING, stored.EVALUATION):
    batch_files.Part(path, there[part]).check()
  return True


def _store_training(
  path: epath.Path,
  configuration: str,
  train_data: sources.TrainData,
  network: api.Network,
  steps: int,
  random_seed: int,
) -> dict[str, Any]:
  """Writes the training batches; returns their entry."""
  writer = batch_files.Writer(path, stored.TRAINING, configuration)
  stretch = sources.Stretch(random_seed)
  source = train_data.source
  with source.train_batches(train_data, network, stretch) as batches:
    for _ in tqdm.trange(steps, desc='steps', disable=None):
      _, batch, _ = next(batches)
      writer.add({name: rows[None] for name, rows in batch.items()})
  shapes = network.batch_shapes(
    train_data.feature_lengths, train_data.batch_size, train_data.pack
  )
  return {**writer.finish(), 'shapes': shapes}


def _store_examples(
  path: epath.Path,
  configuration: str,
  part: str,
  of: Any,
  network: api.Network,
) -> dict[str, Any]:
  """Writes the rows of an evaluation or of held-out text.

  Args:
    path: BATCHES.
    configuration: see `batch_files.digest`.
    part: the name of the part.
    of: `examples` and their `source`.
    network: whose features to make.
  """
  writer = batch_files.Writer(path, part, configuration)
  for batch in of.source.batches(of.examples, network, 1):
    writer.add(batch)
  lengths = of.examples.feature_lengths
  return {
    **writer.finish(),
    'shapes': network.batch_shapes(lengths, 1, pack=False),
    'text_bytes': of.source.bytes_of(of.examples),
  }


def _store_texts(
  path: epath.Path, evaluation: evaluation_lib.Evaluation
) -> dict[str, Any]:
  """Writes the texts of the evaluation, and says how many each task has."""
  lines, tasks = [], []
  task = task_checks.find(evaluation.task)
  for member in task_examples.tasks_of(task):
    if evaluation.split not in member.splits:
      continue
    texts = task_examples.texts_of(
      member, evaluation.feature_lengths, evaluation.split
    )
    rows = [
      {name: text for name, text in row.items() if name != 'tokens'}
      for _, row in zip(
        range(evaluation.num_examples or 2**62), texts, strict=False
      )
    ]
    lines += [json_text.dumps(row, ensure_ascii=False) for row in rows]
    has_metrics = bool(member.metric_fns)
    tasks.append(
      {'name': member.name, 'rows': len(rows), 'has_metrics': has_metrics}
    )
  content = ''.join(f'{line}\n' for line in lines).encode()
  return {
    'texts': batch_files.write(path, stored.TEXTS, content),
    'tasks': tasks,
  }


def _store_vocabulary(path: epath.Path, task: str) -> dict[str, Any]:
  """Writes the vocabulary of a task's targets."""
  features = task_checks.find(task).output_features
  vocabulary = task_vocabulary.of_feature(features['targets'])
  content, model = vocabulary_files.content_of(task, vocabulary)
  content['vocab_size'] = max(
    features[name].vocabulary.vocab_size for name in task_examples.FEATURES
  )
  return stored_vocabulary.store(path, content, model)


def main(arguments: Sequence[str], parse: Callable[..., Any]) -> None:
  """Prepares a task's data, or with `--batches` the batches of a run.

  Args:
    arguments: of the command.
    parse: `binaries.parse`.
  """
  if any(word.partition('=')[0] == '--batches' for word in arguments):
    parse(to_flags(arguments), prepare)()
  else:
    flags = task_names.to_flags(arguments, 'gin/runs/prepare_data.gin')
    parse(flags, preparation.prepare_data)()
