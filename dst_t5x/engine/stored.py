"""The source of batches that were prepared before; see `data.batch_files`.

It needs neither TensorFlow nor seqio. The batch of a step is always the same,
so that a run can go on with stored batches that began with live ones, and the
other way round.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import itertools
import json
import os
from typing import Any

from etils import epath
import numpy as np

from dst_t5x.core import json_text
from dst_t5x.core import object_stores
from dst_t5x.core import values
from dst_t5x.core import whole_files
from dst_t5x.core.errors import UserError
from dst_t5x.data import batch_files
from dst_t5x.data import data_position
from dst_t5x.data import stored_vocabulary
from dst_t5x.engine import evaluation as evaluation_lib
from dst_t5x.engine import held_out as held_out_lib
from dst_t5x.engine import sources
from dst_t5x.models import api
from dst_t5x.runtime import processes

PyTree = Any
TRAINING, EVALUATION, HELD_OUT = 'training', 'evaluation', 'held_out'
# Part of the held-out text as the network without its adapter reads it.
HELD_OUT_BASE = 'held_out_base'
TEXTS = 'evaluation.jsonl'


class Stored(sources.Source):
  """Batches in a folder.

  Attributes:
    settings: macro -> value, of what the batches depend on.
  """

  def __init__(self, folder: str | os.PathLike[str]) -> None:
    """Reads `batches.json`.

    Raises:
      UserError: there is none, or it is damaged.
    """
    self._folder = epath.Path(folder)
    self._about = batch_files.read_about(folder)
    self.settings: Mapping[str, Any] = self._about['settings']
    self._vocabulary = stored_vocabulary.StoredVocabulary(
      self._folder, self._about['vocabulary']
    )

  def same(self, **asked: Any) -> None:
    """Checks settings, by the names of their macros; None is not asked.

    Raises:
      UserError: the batches were made with another value.
    """
    for name, value in asked.items():
      there = self.settings[name]
      if value is not None and json_text.plain(value) != there:
        raise UserError(
          f'the batches in {self._folder} were made with {name} = {there!r},'
          f' not {value!r}: set --gin.{name}={there!r}, or prepare batches'
          ' with the other value'
        )

  @property
  def recorded(self) -> Mapping[str, Any]:
    """See `sources.Source`."""
    recorded: dict[str, Any] = self._about['identity']
    return recorded

  def part(self, name: str) -> batch_files.Part:
    """Returns the rows of a part."""
    return batch_files.Part(self._folder, self._about[name])

  def check_training(
    self, data: sources.TrainData, network: api.Network
  ) -> int:
    """See `sources.Source`."""
    self._check_network(network)
    shapes = network.batch_shapes(
      data.feature_lengths, data.batch_size, data.pack
    )
    self._check_features(TRAINING, shapes)
    self._vocabulary.check()
    return self._vocabulary.vocab_size

  def _check_network(self, network: api.Network) -> None:
    if network.vocab_size < self._vocabulary.vocab_size:
      raise UserError(
        f'the batches in {self._folder} have a vocabulary of'
        f' {self._vocabulary.vocab_size} ids, but vocab_size of the model is'
        f' {network.vocab_size}: choose another model, or prepare batches for'
        ' this one'
      )
    there = self._about['network']
    ours = facts_of(network)
    for name, value in ours.items():
      if value != there[name]:
        raise UserError(
          f'the batches in {self._folder} were made for a model whose {name} is'
          f' {there[name]}, not {value}: choose that model, or prepare batches'
          ' for this one'
        )

  def _check_features(self, part: str, shapes: Mapping[str, Any]) -> None:
    """Checks that the rows of a part are as a network announces its own."""
    there = {k: tuple(v[1:]) for k, v in self._about[part]['shapes'].items()}
    ours = {name: tuple(shape[1:]) for name, shape in shapes.items()}
    if ours != there:
      raise UserError(
        f'the {part} batches in {self._folder} have the features {there}, and'
        f' this model reads {ours}: prepare batches with the same model and'
        ' method'
      )
    self.part(part).check()

  def rows_of(self, task: str, split: str) -> dict[str, Any]:
    """See `sources.Source`."""
    rows: dict[str, Any] = self._about['rows'][f'{task}/{split}']
    return rows

  def encode(self, task: str) -> Callable[[str], list[int]]:
    """See `sources.Source`."""
    return self._vocabulary.encode

  @contextlib.contextmanager
  def train_batches(
    self,
    data: sources.TrainData,
    network: api.Network,
    stretch: sources.Stretch,
  ) -> Iterator[Iterator[data_position.TrainItem]]:
    """See `sources.Source`."""
    yield self._train_items(data, stretch)

  def _train_items(
    self, data: sources.TrainData, stretch: sources.Stretch
  ) -> Iterator[data_position.TrainItem]:
    rows = self.part(TRAINING).rows(stretch.step)
    for step, batch in enumerate(rows, start=stretch.step + 1):
      position = None
      if stretch.save_after(step):
        # Live data goes on from it, too.
        position = data_position.counted(step)
        if data.shards > 1:
          position = data_position.pack(
            dict.fromkeys(range(data.shards), position)
          )
      yield data_position.TrainItem(step, stretch.place(batch), position)
    raise UserError(
      f'the batches in {self._folder} end before step {step + 1}: prepare more'
    )

  def check(
    self,
    examples: sources.Examples,
    network: api.Network,
    in_chat: bool = True,
  ) -> None:
    """See `sources.Source`."""
    self._check_network(network)
    part = self._part_of(examples, network)
    self._check_features(part, _shapes(examples, network))

  def _part_of(self, examples: sources.Examples, network: api.Network) -> str:
    """Returns the name of the part that has some examples."""
    if not self._is_held_out(examples):
      return EVALUATION
    if HELD_OUT_BASE in self._about and network == network.base:
      return HELD_OUT_BASE
    return HELD_OUT

  def _is_held_out(self, examples: sources.Examples) -> bool:
    asked = {
      'HELD_OUT_TASK': examples.task,
      'HELD_OUT_FEATURE_LENGTHS': dict(examples.feature_lengths),
      'HELD_OUT_SPLIT': examples.split,
      'HELD_OUT_EXAMPLES': examples.num_examples,
    }
    return all(self.settings[name] == value for name, value in asked.items())

  def batches(
    self, examples: sources.Examples, network: api.Network, batch_size: int
  ) -> Iterator[sources.Batch]:
    """See `sources.Source`."""
    rows = self.part(self._part_of(examples, network)).rows()
    while several := list(itertools.islice(rows, batch_size)):
      missing = ((0, batch_size - len(several)), (0, 0))
      yield {
        name: np.pad(np.stack([row[name] for row in several]), missing)
        for name in several[0]
      }

  def counts_bytes(self, examples: sources.Examples) -> bool:
    """See `sources.Source`."""
    return self.bytes_of(examples) is not None

  def bytes_of(self, examples: sources.Examples) -> int | None:
    """See `sources.Source`."""
    is_held_out = self._is_held_out(examples)
    part = self._about[HELD_OUT if is_held_out else EVALUATION]
    count: int | None = part['text_bytes']
    return count

  def metrics(
    self, examples: sources.Examples, network: api.Network
  ) -> list[str]:
    """See `sources.Source`; a task's own metrics are not computed."""
    return []

  def scorer(
    self,
    examples: sources.Examples,
    network: api.Network,
    predict: sources.Predict,
    output_dir: str,
  ) -> sources.Scorer:
    """See `sources.Source`; it writes predictions."""
    return _Predictions(self, predict, output_dir)

  def scored(self) -> Iterator[tuple[str, int, int]]:
    """Yields task, first row and number of rows, where a task has metrics."""
    start = 0
    for task in self._about[EVALUATION]['tasks']:
      if task['has_metrics']:
        yield task['name'], start, task['rows']
      start += task['rows']

  def texts(self) -> list[dict[str, Any]]:
    """Returns `inputs`, `targets` … of the rows of the evaluation."""
    entry = self._about[EVALUATION]['texts']
    # Not `splitlines`: a text may have other separators.
    *lines, _ = batch_files.read(self._folder, entry).decode().split('\n')
    return [json.loads(line) for line in lines]

  def decode(self, ids: np.ndarray) -> str:
    """Returns the text of a prediction."""
    return self._vocabulary.decode(ids.tolist())


class _Predictions:
  """Decodes the examples, and writes rows that `dst_t5x.score` reads."""

  texts: Mapping[str, str]

  def __init__(
    self, source: Stored, predict: sources.Predict, output_dir: str
  ) -> None:
    """Takes where the examples are, what decodes them, and the folder."""
    self.texts = {}
    self._source = source
    self._predict = predict
    self._folder = epath.Path(output_dir)

  def __call__(self, params: PyTree, step: int) -> dict[str, float]:
    """Writes the predictions; returns no metric."""
    texts = self._source.texts()
    for task, start, count in self._source.scored():
      rows = self._source.part(EVALUATION).rows(start)
      examples = enumerate(itertools.islice(rows, count))
      found = dict(self._predict(params, examples))
      if processes.is_first():
        lines = [
          json_text.dumps(
            {**texts[start + i], 'prediction': self._source.decode(found[i])},
            ensure_ascii=False,
          )
          for i in range(count)
        ]
        object_stores.make_folder(self._folder)
        path = self._folder / f'{task}-{step:06d}.jsonl'
        whole_files.write_text(path, ''.join(f'{line}\n' for line in lines))
    return {}


def _shapes(examples: sources.Examples, network: api.Network) -> api.Shapes:
  lengths = examples.feature_lengths
  return network.batch_shapes(lengths, 1, pack=False)


def facts_of(network: api.Network) -> dict[str, Any]:
  """Returns what rows depend on, besides the shapes of the features."""
  return {
    'pad_id': network.pad_id,
    'EOS_ID': network.eos_id,
    'BEGIN_ID': network.begin_id,
  }


def train_data(
  batches: values.Path,
  task: str | None = None,
  feature_lengths: Mapping[str, values.Positive] | None = None,
  batch_size: values.Positive | None = None,
  pack: bool | None = None,
  shards: values.Positive | None = None,
  random_seed: values.RandomSeed | None = None,
  train_steps: values.Positive = 1,
) -> sources.TrainData:
  """Returns the stored training data.

  Args:
    batches: the folder.
    task: MIXTURE_OR_TASK_NAME; for all that follow, None is what is there.
    feature_lengths: TASK_FEATURE_LENGTHS.
    batch_size: BATCH_SIZE.
    pack: PACK.
    shards: DATA_SHARDS.
    random_seed: RANDOM_SEED.
    train_steps: TRAIN_STEPS; there may be more batches.

  Raises:
    UserError: the batches were made with other settings, or are too few.
  """
  stored = Stored(batches)
  stored.same(
    MIXTURE_OR_TASK_NAME=task,
    TASK_FEATURE_LENGTHS=feature_lengths,
    BATCH_SIZE=batch_size,
    PACK=pack,
    DATA_SHARDS=shards,
    RANDOM_SEED=random_seed,
  )
  there = stored.settings['TRAIN_STEPS']
  if train_steps > there:
    raise UserError(
      f'the batches in {batches} are of {there} steps, and TRAIN_STEPS ='
      f' {train_steps}: set --gin.TRAIN_STEPS={there}, or prepare more'
    )
  return sources.TrainData(
    stored.settings['MIXTURE_OR_TASK_NAME'],
    stored.settings['TASK_FEATURE_LENGTHS'],
    stored.settings['BATCH_SIZE'],
    stored,
    stored.settings['PACK'],
    stored.settings['DATA_SHARDS'],
  )


def evaluation(
  batches: values.Path,
  decoder: evaluation_lib.Decoder,
  task: str | None = None,
  feature_lengths: Mapping[str, values.Positive] | None = None,
  split: str | None = None,
  batch_size: values.Positive = 32,
  num_examples: values.Positive | None = None,
  max_decode_length: values.Positive | None = None,
  held_out_task: str | None = None,
  held_out_lengths: Mapping[str, values.Positive] | None = None,
  held_out_split: str | None = None,
  held_out_examples: values.Positive | None = None,
) -> evaluation_lib.Evaluation:
  """Returns the evaluation of stored examples; arguments as in `train_data`.

  Args:
    batches: the folder.
    decoder: greedy, beam search or sampling.
    task: MIXTURE_OR_TASK_NAME.
    feature_lengths: TASK_FEATURE_LENGTHS.
    split: EVAL_SPLIT.
    batch_size: EVAL_BATCH_SIZE, which the stored examples do not depend on.
    num_examples: EVAL_EXAMPLES.
    max_decode_length: the most tokens to decode; by default the length of the
      targets.
    held_out_task: HELD_OUT_TASK.
    held_out_lengths: HELD_OUT_FEATURE_LENGTHS.
    held_out_split: HELD_OUT_SPLIT.
    held_out_examples: HELD_OUT_EXAMPLES.

  Raises:
    UserError: the batches were made with other settings.
  """
  stored = Stored(batches)
  stored.same(
    MIXTURE_OR_TASK_NAME=task,
    TASK_FEATURE_LENGTHS=feature_lengths,
    EVAL_SPLIT=split,
    EVAL_EXAMPLES=num_examples,
    HELD_OUT_TASK=held_out_task,
    HELD_OUT_FEATURE_LENGTHS=held_out_lengths,
    HELD_OUT_SPLIT=held_out_split,
    HELD_OUT_EXAMPLES=held_out_examples,
  )
  there = stored.settings
  held_out = None
  if there['HELD_OUT_TASK'] is not None:
    examples = sources.Examples(
      there['HELD_OUT_TASK'],
      there['HELD_OUT_FEATURE_LENGTHS'],
      there['HELD_OUT_SPLIT'],
      batch_size,
      there['HELD_OUT_EXAMPLES'],
    )
    held_out = held_out_lib.HeldOut(examples, stored)
  return evaluation_lib.Evaluation(
    there['MIXTURE_OR_TASK_NAME'],
    there['TASK_FEATURE_LENGTHS'],
    decoder,
    there['EVAL_SPLIT'],
    batch_size,
    there['EVAL_EXAMPLES'],
    max_decode_length,
    held_out=held_out,
    source=stored,
  )
