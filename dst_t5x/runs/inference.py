"""Decodes a text file, or a split of a task."""

from collections.abc import Iterator, Mapping, Sequence
import itertools
import os
from typing import Any

from dst_t5x.core import json_text
from dst_t5x.runtime import quiet_tensorflow  # noqa: F401

# isort: split
from absl import logging
from etils import epath
import numpy as np
import seqio
import tqdm

from dst_t5x.core import object_stores
from dst_t5x.core import values
from dst_t5x.core import whole_files
from dst_t5x.core.errors import UserError, check_positive, writing
from dst_t5x.data import conversations
from dst_t5x.data import task_checks
from dst_t5x.data import task_examples
from dst_t5x.data import task_vocabulary
from dst_t5x.data import text_files
from dst_t5x.engine import evaluation as evaluation_lib
from dst_t5x.engine import parameters
from dst_t5x.engine import partitioning
from dst_t5x.models import api
from dst_t5x.runtime import processes


def infer(
  network: api.Network,
  checkpoint_path: values.Path,
  output_dir: values.Path,
  task: str,
  feature_lengths: Mapping[str, values.Positive],
  decoder: evaluation_lib.Decoder,
  partitioner: partitioning.Partitioner,
  checkpoint_step: values.Count | None = None,
  initial_checkpoint_path: values.Path | None = None,
  input_file: values.Path | None = None,
  split: str = 'test',
  num_examples: values.Positive | None = None,
  batch_size: values.Positive = 32,
) -> str:
  """Writes a prediction for each input, as JSON lines.

  Args:
    network: the model.
    checkpoint_path: a run folder, or a checkpoint in any format of `seeds`.
    output_dir: the folder of `predictions.jsonl`, whose rows have the inputs'
      order: `{"inputs": …, "prediction": …}`. Rows of a split also have
      `"targets"`, and lists of texts such as `"references"` if the task has
      them. Rows of a mixture also have `"task"`. The first process writes.
    task: the task; supplies the vocabulary, and the inputs if there is no
      `input_file`.
    feature_lengths: feature -> longest length; longer inputs are truncated.
    decoder: greedy, beam search or sampling.
    partitioner: the mesh and its shardings.
    checkpoint_step: the checkpoint of a run folder; the last by default.
    initial_checkpoint_path: the path of the run's seed, if it was moved.
    input_file: inputs as the task's preprocessing makes them, one per line. If
      the name ends in `.jsonl` or `.tsv`, lines are rows with named fields. A
      row may have `messages` instead; see `conversations`.
    split: the task's split, if there is no `input_file`.
    num_examples: the number of inputs, over all tasks; all by default.
    batch_size: the number of inputs in a batch, rounded up so that the devices
      share it evenly.

  Returns:
    The path of the predictions.

  Raises:
    UserError: a setting is out of range, the checkpoint, the task or the inputs
      cannot be read, or the output folder has predictions for other inputs.
  """
  check_positive('INFER_BATCH_SIZE', batch_size)
  if num_examples is not None:
    check_positive('INFER_EXAMPLES', num_examples)
  found = task_checks.check(
    task, feature_lengths, batch_size, None if input_file else split
  )
  features = found.output_features
  task_vocabulary.check_fits(features, network.vocab_size)
  task_vocabulary.check_special(features, network.eos_id, network.begin_id)
  inputs, targets = (feature_lengths[name] for name in ('inputs', 'targets'))
  evaluation_lib.check_decoder(decoder, network, batch_size, inputs, targets)
  examples = (
    _of_file(input_file, features['inputs'], feature_lengths)
    if input_file
    else _of_split(found, feature_lengths, split)
  )
  rows = list(itertools.islice(examples, num_examples))
  if not rows:
    raise UserError(f'{input_file or task} holds no input')
  folder = epath.Path(output_dir)
  path = folder / 'predictions.jsonl'
  object_stores.check_writable('INFER_OUTPUT_DIR', folder)
  if processes.is_first():
    _check_replaceable(path, rows)
  partitioner = parameters.choose_mesh(
    network, partitioner, partitioning.IN_EVALUATION
  )
  with partitioner.activate():
    loaded = parameters.load(
      network,
      partitioner,
      checkpoint_path,
      checkpoint_step,
      initial_checkpoint_path,
    )
    decoded = _decode(
      loaded, rows, decoder, feature_lengths, batch_size, partitioner
    )
  if processes.is_first():
    _write(path, rows, decoded, features['targets'].vocabulary)
  return str(path)


def _decode(
  loaded: parameters.Loaded,
  rows: Sequence[Mapping[str, Any]],
  decoder: evaluation_lib.Decoder,
  feature_lengths: Mapping[str, int],
  batch_size: int,
  partitioner: partitioning.Partitioner,
) -> list[np.ndarray]:
  """Returns the predicted tokens of each row; arguments as in `infer`."""
  network, length = loaded.network, feature_lengths['inputs']
  predictor = evaluation_lib.Predictor(
    network, decoder, batch_size, feature_lengths['targets'], partitioner
  )

  def prompt(tokens: Sequence[int]) -> np.ndarray:
    padded = np.full(length, network.pad_id, np.int32)
    padded[: len(tokens)] = tokens
    return network.prompt_of_inputs(padded)

  quiet = None if processes.is_first() else True
  bar = tqdm.tqdm(rows, unit='input', disable=quiet)
  prompts = ((i, prompt(row['tokens'])) for i, row in enumerate(bar))
  return [tokens for _, tokens in predictor(loaded.params, prompts)]


def _write(
  path: epath.Path,
  rows: Sequence[Mapping[str, Any]],
  decoded: Sequence[np.ndarray],
  vocabulary: seqio.Vocabulary,
) -> None:
  """Writes rows and their predictions, atomically."""
  lines = []
  for row, tokens in zip(rows, decoded, strict=True):
    shown = {k: v for k, v in row.items() if k != 'tokens'}
    text = vocabulary.decode(tokens.tolist())
    line = json_text.dumps(shown | {'prediction': text}, ensure_ascii=False)
    lines.append(line + '\n')
  with writing(f'INFER_OUTPUT_DIR {path.parent}'):
    whole_files.write_text(path, ''.join(lines))
  logging.info('%d predictions in %s', len(rows), path)


def _check_replaceable(
  path: epath.Path, rows: Sequence[Mapping[str, Any]]
) -> None:
  """Raises UserError if predictions for other inputs would be overwritten."""
  with object_stores.explained(path, f'cannot read {path}: '):
    if not path.exists():
      return
  lines = text_files.read(os.fspath(path), path, text_files.parse_object)
  for before, row in itertools.zip_longest(lines, rows, fillvalue=None):
    if before is None:
      return
    if row is None or before.get('inputs') != row['inputs']:
      raise UserError(
        f'{path} has predictions for inputs that would not be decoded now:'
        ' choose another INFER_OUTPUT_DIR, or remove that file'
      )


def _of_file(
  path: str, feature: seqio.Feature, lengths: Mapping[str, int]
) -> Iterator[dict[str, Any]]:
  length, is_told = lengths['inputs'], False
  for number, texts in enumerate(_texts(path), start=1):
    tokens = list(feature.vocabulary.encode(texts['inputs']))
    most = length - feature.add_eos
    if len(tokens) > most and not is_told:
      is_told = True
      logging.warning(
        'INPUT_FILE %s: input %d has %d pieces: TASK_FEATURE_LENGTHS cuts its'
        ' end, and that of all others above %d',
        *(path, number, len(tokens), most),
      )
    end = [feature.vocabulary.eos_id] if feature.add_eos else []
    yield texts | {'tokens': [*tokens[:most], *end]}


def _texts(path: str) -> Iterator[dict[str, Any]]:
  """Yields the rows of INPUT_FILE: `inputs`, and targets if it has them."""
  what = f'INPUT_FILE {path}'
  suffix = epath.Path(path).suffix
  if suffix == '.jsonl':
    yield from text_files.read(what, path, _parse_row)
  elif suffix == '.tsv':
    pairs = text_files.read(what, path, text_files.parse_tabs)
    for i, pair in enumerate(pairs):
      if not i:
        text_files.warn_of_title(what, pair)
      yield dict(zip(text_files.HEADER, pair, strict=True))
  else:
    for text in text_files.read_texts(what, path):
      yield {'inputs': text}


def _parse_row(line: str) -> dict[str, Any] | None:
  row = text_files.parse_object(line)
  if row is None:
    return None
  if conversations.KEY in row:
    asked, answer = conversations.split(row[conversations.KEY])
    task_vocabulary.check_messages(asked)
    return {'inputs': asked} | ({} if answer is None else {'targets': answer})
  texts: dict[str, Any] = {'inputs': text_files.text_of(row, 'inputs')}
  for name in ('targets', 'references'):
    if name in row:
      text_files.texts_of(row, name)
      texts[name] = row[name]
  return texts


def _of_split(
  task: task_examples.Task, lengths: Mapping[str, int], split: str
) -> Iterator[dict[str, Any]]:
  members = [m for m in task_examples.tasks_of(task) if split in m.splits]
  for member in members:
    for texts in task_examples.texts_of(member, lengths, split):
      if len(members) > 1:
        texts['task'] = member.name
      yield texts
