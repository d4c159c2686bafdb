"""A real pretrained model on a laptop: `python -m dst_t5x.smollm2 --seed=DIR`.

SmolLM2-135M-Instruct learns to translate names, such as those of countries and
currencies, from German to English: subsets chosen by DST at two budgets, a
random subset, and LoRA with about as many parameters. One more subset for each
other language shows what a server is to swap. Everything goes through the gin
files and commands that other runs use. A second call finds what the first has
done.

The seed is the model as a GGUF file has it, dequantised from 4 bits; all
numbers are of that model.
"""

from collections.abc import Sequence
import dataclasses
import pathlib
import shutil
import time
from typing import Any

from etils import epath
import jax

from dst_t5x.config import binaries
from dst_t5x.core import command_line
from dst_t5x.core import json_text
from dst_t5x.core import metrics_file
from dst_t5x.core import object_stores
from dst_t5x.core.errors import UserError
from dst_t5x.data import cldr_names
from dst_t5x.runs import artifacts
from dst_t5x.runs import demonstrations
from dst_t5x.runs import training
from dst_t5x.tasks import prose

_EXACT, _CHRF, _LOSS = 'jsonl/exact_match', 'jsonl/chrf', 'eval/loss'
_STEPS = 32
_BATCH_SIZE = 8  # Rows, each of which holds about three names.
_TEST_ROWS = 96  # Decoding takes as long as 20 steps.
_LANGUAGE = 'de'
_OTHERS = ('fr', 'es')
_COLUMNS = (
  ('method', 'name', ''),
  ('exact %', 'exact_match', '.1f'),
  ('chrF', 'chrf', '.1f'),
  ('loss', 'loss', '.3f'),
  ('forgetting', 'forgetting', '+.3f'),
  ('free', 'free_parameters', ','),
  ('share %', 'share', '.4f'),
  ('bytes', 'bytes', ','),
  ('s/step', 'seconds_per_step', '.2f'),
)


@dataclasses.dataclass(frozen=True)
class Tuning:
  """A fine-tuning run.

  Attributes:
    name: in the table, and of its folder.
    method: gin file in `gin/methods/`.
    learning_rate: the best on the development rows, of a search for this method
      and budget.
    bindings: other settings.
    language: whose names are translated.
  """

  name: str
  method: str
  learning_rate: float
  bindings: tuple[str, ...] = ()
  language: str = _LANGUAGE


# Learning rates: the best of 0.03, 0.1, 0.3, 1 and 3 after 20 steps. LoRA
# has the second best: with 1, its loss rises again.
TUNINGS = (
  Tuning('dst_1e-3', 'dst', 0.3, ('EPSILON=1e-3',)),
  Tuning('dst_1e-4', 'dst', 1.0, ('EPSILON=1e-4',)),
  Tuning('random_1e-3', 'random', 1.0, ('EPSILON=1e-3',)),
  Tuning(
    'lora_r1',
    'lora',
    0.3,
    ("LORA_TARGETS='.*attention/(query|key|value|out)'", 'LORA_RANK=1'),
  ),
)
_OTHER_TUNINGS = tuple(
  dataclasses.replace(TUNINGS[1], name=f'dst_1e-4_{x}', language=x)
  for x in _OTHERS
)


@dataclasses.dataclass(frozen=True)
class Folder:
  """The files of the demonstration.

  Attributes:
    seed: the model, in Hugging Face's format with its tokenizer.
    output: for everything else.
  """

  seed: pathlib.Path
  output: pathlib.Path

  def write_data(self) -> None:
    """Writes the rows of all languages."""
    for language in (_LANGUAGE, *_OTHERS):
      cldr_names.write_files(language, self.output / 'data')

  def data(self, name: str, split: str) -> pathlib.Path:
    """Returns a file of rows."""
    return self.output / 'data' / f'{name}_{split}.jsonl'

  def model(self) -> list[str]:
    """Returns the flags for the model and the form of its task."""
    return [
      '--gin_file=gin/models/smollm2_135m.gin',
      '--gin_file=gin/tasks/jsonl.gin',
      f"--gin.VOCABULARY='{self.seed}'",
      '--gin.EOS_ID=2',  # <|im_end|>, as in all models of the kind Instruct.
      '--gin.EVAL_BATCH_SIZE=16',
    ]

  def names(self, language: str) -> list[str]:
    """Returns the flags for the task of a language."""
    return [
      "--gin.TASK_FEATURE_LENGTHS={'inputs': 24, 'targets': 16}",
      f"--gin.TRAIN_FILE='{self.data(language, 'train')}'",
      f"--gin.EVAL_FILE='{self.data(language, 'test')}'",
      "--gin.METRICS=['exact_match', 'chrf']",
      f'--gin.EVAL_EXAMPLES={_TEST_ROWS}',
    ]


def tune(tuning: Tuning, folder: Folder) -> None:
  """Fine-tunes the seed."""
  demonstrations.call(
    training.train,
    *folder.model(),
    f'--gin_file=gin/methods/{tuning.method}.gin',
    '--gin_file=gin/runs/finetune.gin',
    *folder.names(tuning.language),
    *(f'--gin.{binding}' for binding in tuning.bindings),
    f'--gin.LEARNING_RATE={tuning.learning_rate}',
    '--gin.LEARNING_RATE_DECAY=linear',
    f'--gin.LEARNING_RATE_DECAY_STEPS={_STEPS}',
    '--gin.DROPOUT_RATE=0.0',
    f'--gin.TRAIN_STEPS={_STEPS}',
    f'--gin.EVAL_PERIOD={_STEPS}',
    f'--gin.CHECKPOINT_PERIOD={_STEPS // 2}',
    f'--gin.BATCH_SIZE={_BATCH_SIZE}',
    '--gin.LOG_PERIOD=5',
    f'--gin.HELD_OUT_TASK={prose.NAME}',
    "--gin.HELD_OUT_FEATURE_LENGTHS={'inputs': 40, 'targets': 96}",
    f"--gin.INITIAL_CHECKPOINT_PATH='{folder.seed}'",
    f"--gin.MODEL_DIR='{folder.output / tuning.name}'",
  )


def zero_shot(folder: Folder) -> dict[str, float]:
  """Evaluates the seed as it is."""
  return demonstrations.evaluate_once(
    folder.output / 'zero_shot',
    *folder.model(),
    '--gin_file=gin/runs/eval.gin',
    *folder.names(_LANGUAGE),
    f"--gin.CHECKPOINT_PATH='{folder.seed}'",
  )


def row_of(tuning: Tuning, folder: Folder) -> dict[str, Any]:
  """Returns a run's row of the table, from the files in its folder."""
  run = folder.output / tuning.name
  facts = demonstrations.facts(run)
  results = artifacts.read_report(run)['results']
  return {
    'name': tuning.name,
    'method': tuning.method,
    'language': tuning.language,
    'learning_rate': tuning.learning_rate,
    **_scores(results),
    'forgetting': results[metrics_file.FORGETTING],
    'share': 100 * facts['free_parameters'] / facts['parameters'],
    **facts,
  }


def _scores(results: dict[str, float]) -> dict[str, float]:
  return {
    'exact_match': results[_EXACT],
    'chrf': results[_CHRF],
    'loss': results[_LOSS],
  }


def plot(rows: Sequence[dict[str, Any]], path: pathlib.Path) -> None:
  """Draws loss and forgetting against the budget to a PNG."""
  import matplotlib

  matplotlib.use('Agg')
  import matplotlib.pyplot as plt

  figure, both = plt.subplots(1, 2, figsize=(9.6, 4.2), dpi=150)
  before, *tuned = [row for row in rows if row['language'] == _LANGUAGE]
  for axes, value, label in zip(
    both,
    ('loss', 'forgetting'),
    (
      'loss per target token (nats)',
      'rise of the loss on English prose (nats)',
    ),
    strict=True,
  ):
    axes.axhline(before[value], color='0.4', linestyle='-.', label='zero-shot')
    for method, marker in (('dst', 'o-'), ('random', 's'), ('lora', '^')):
      points = sorted(
        (row['share'], row[value]) for row in tuned if row['method'] == method
      )
      if points:
        axes.plot(*zip(*points, strict=True), marker, label=method)
    axes.set_xscale('log')
    axes.set_xlabel('free parameters (% of the model)')
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
  both[0].legend()
  figure.suptitle(
    'Names from German to English, SmolLM2-135M-Instruct (4 bits)'
  )
  figure.tight_layout()
  figure.savefig(path)
  plt.close(figure)


def gather_subsets(folder: Folder) -> pathlib.Path:
  """Copies the subset of each language to one folder, for the server."""
  subsets = folder.output / 'subsets'
  subsets.mkdir(exist_ok=True)
  for tuning in (TUNINGS[1], *_OTHER_TUNINGS):
    shutil.copy(
      artifacts.subset_file(epath.Path(folder.output / tuning.name)),
      subsets / f'{cldr_names.title(tuning.language).lower()}.dst',
    )
  return subsets


def demonstrate(folder: Folder) -> list[dict[str, Any]]:
  """Runs the whole demonstration.

  Returns:
    A flat row for each line of the table.

  Raises:
    UserError: the seed is missing, or the folder cannot be written to.
  """
  started = time.time()
  if not (folder.seed / 'config.json').exists():
    raise UserError(
      f'--seed {folder.seed} has no config.json: `python -m dst_t5x.convert'
      ' FILE.gguf DIR --format=hf` makes such a folder'
    )
  object_stores.check_writable('--output', epath.Path(folder.output))
  # Runs of one shape share what is compiled.
  cache = str(folder.output / '.compiled')
  jax.config.update('jax_compilation_cache_dir', cache)
  folder.write_data()
  before = zero_shot(folder)
  rows = []
  for tuning in (*TUNINGS, *_OTHER_TUNINGS):
    tune(tuning, folder)
    rows.append(row_of(tuning, folder))
  zero_shot_row = demonstrations.zero_shot_row(
    rows[0],
    folder.output / 'zero_shot',
    language=_LANGUAGE,
    forgetting=0.0,
    **_scores(before),
  )
  rows.insert(0, zero_shot_row)
  _tell(rows, folder, time.time() - started)
  return rows


def _tell(rows: list[dict[str, Any]], folder: Folder, seconds: float) -> None:
  output = folder.output
  text = json_text.dumps(rows, indent=2) + '\n'
  (output / 'results.json').write_text(text)
  plot(rows, output / 'loss_vs_budget.png')
  subsets = gather_subsets(folder)
  print(f'\n{demonstrations.table(rows, _COLUMNS)}\n')
  print(f'{seconds:.0f} s in all')
  print(f'table and picture   {output}/results.json, loss_vs_budget.png')
  print(f'subset files        {subsets}')
  print(
    f'to serve them       python -m dst_t5x.serve --seed={folder.seed}'
    f' --subsets={subsets}'
  )


def main() -> None:
  """Parses the command line."""
  parser = command_line.Parser(description=__doc__.splitlines()[0])
  parser.add_argument(
    '--seed',
    type=pathlib.Path,
    required=True,
    help="folder of the model and its tokenizer, in Hugging Face's format",
  )
  parser.add_argument(
    '--output', type=pathlib.Path, default=pathlib.Path('runs/smollm2')
  )
  arguments = parser.parse_args()
  folder = Folder(arguments.seed.expanduser(), arguments.output.expanduser())
  binaries.perform(lambda: demonstrate(folder))
