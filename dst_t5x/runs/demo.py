"""A demonstration in minutes: `python -m dst_t5x.demo --output=runs/demo`.

Pretrains a tiny T5 1.1 on bytes, then tunes it for a new operation: by full
fine-tuning, by DST, and with random subsets at the same budgets. It uses the
gin files and binaries of real runs. A second call continues the first.
"""

from collections.abc import Sequence
import dataclasses
import pathlib
import time
from typing import Any

from etils import epath
import jax

from dst_t5x.config import binaries
from dst_t5x.core import command_line
from dst_t5x.core import json_text
from dst_t5x.core import object_stores
from dst_t5x.runs import artifacts
from dst_t5x.runs import demonstrations
from dst_t5x.runs import training

_MODEL = 'gin/models/t5_1_1_demo.gin'
_SCORE = 'demo_finetune/exact_match'
_CHARACTERS = 'demo_finetune/character_accuracy'
_PRETRAIN_STEPS = 400
_STEPS = 120
_BATCH_SIZE = 64
# Title, value, format.
_COLUMNS = (
  ('method', 'name', ''),
  ('exact %', 'exact_match', '.1f'),
  ('characters %', 'character_accuracy', '.1f'),
  ('free', 'free_parameters', ','),
  ('share %', 'share', '.4f'),
  ('bytes', 'bytes', ','),
  ('s/step', 'seconds_per_step', '.3f'),
)


@dataclasses.dataclass(frozen=True)
class Tuning:
  """One fine-tuning run of the demonstration.

  Attributes:
    name: the run's name in the table, and its folder.
    method: the name of a gin file in `gin/methods/`.
    learning_rate: the best of a search for this method and budget.
    epsilon: ε; None for full fine-tuning.
  """

  name: str
  method: str
  learning_rate: float
  epsilon: float | None = None


TUNINGS = (
  Tuning('full', 'full', 0.03),
  Tuning('dst_1e-1', 'dst', 0.1, 1e-1),
  Tuning('dst_1e-2', 'dst', 0.3, 1e-2),
  Tuning('dst_1e-3', 'dst', 1.5, 1e-3),
  Tuning('random_1e-1', 'random', 0.1, 1e-1),
  Tuning('random_1e-2', 'random', 1.0, 1e-2),
  Tuning('random_1e-3', 'random', 5.0, 1e-3),
)


def pretrain(folder: pathlib.Path) -> None:
  """Pretrains the seed."""
  demonstrations.call(
    training.train,
    f'--gin_file={_MODEL}',
    '--gin_file=gin/tasks/demo_pretrain.gin',
    '--gin_file=gin/runs/pretrain.gin',
    f'--gin.TRAIN_STEPS={_PRETRAIN_STEPS}',
    '--gin.LEARNING_RATE=0.03',
    '--gin.LEARNING_RATE_WARMUP_STEPS=30',
    '--gin.LEARNING_RATE_DECAY=cosine',
    f'--gin.LEARNING_RATE_DECAY_STEPS={_PRETRAIN_STEPS}',
    f'--gin.BATCH_SIZE={_BATCH_SIZE}',
    '--gin.PACK=False',
    '--gin.LOG_PERIOD=100',
    f'--gin.EVAL_PERIOD={_PRETRAIN_STEPS}',
    '--gin.EVAL_EXAMPLES=256',
    '--gin.EVAL_BATCH_SIZE=128',
    f"--gin.MODEL_DIR='{folder}'",
  )


def tune(tuning: Tuning, seed: pathlib.Path, folder: pathlib.Path) -> None:
  """Fine-tunes the seed."""
  epsilon = (
    [] if tuning.epsilon is None else [f'--gin.EPSILON={tuning.epsilon}']
  )
  demonstrations.call(
    training.train,
    f'--gin_file={_MODEL}',
    '--gin_file=gin/tasks/demo_finetune.gin',
    f'--gin_file=gin/methods/{tuning.method}.gin',
    '--gin_file=gin/runs/finetune.gin',
    *epsilon,
    f'--gin.LEARNING_RATE={tuning.learning_rate}',
    '--gin.LEARNING_RATE_DECAY=linear',
    f'--gin.LEARNING_RATE_DECAY_STEPS={_STEPS}',
    '--gin.DROPOUT_RATE=0.0',
    f'--gin.TRAIN_STEPS={_STEPS}',
    f'--gin.BATCH_SIZE={_BATCH_SIZE}',
    '--gin.PACK=False',
    '--gin.LOG_PERIOD=25',
    '--gin.EVAL_BATCH_SIZE=128',
    f"--gin.INITIAL_CHECKPOINT_PATH='{seed}'",
    f"--gin.MODEL_DIR='{folder}'",
  )


def zero_shot(seed: pathlib.Path, folder: pathlib.Path) -> dict[str, float]:
  """Evaluates the seed as it is."""
  return demonstrations.evaluate_once(
    folder,
    f'--gin_file={_MODEL}',
    '--gin_file=gin/tasks/demo_finetune.gin',
    '--gin_file=gin/runs/eval.gin',
    '--gin.EVAL_BATCH_SIZE=128',
    f"--gin.CHECKPOINT_PATH='{seed}'",
  )


def row_of(tuning: Tuning, folder: pathlib.Path) -> dict[str, Any]:
  """Returns a run's row of the table, from the files in its folder."""
  results = artifacts.read_report(folder)['results']
  facts = demonstrations.facts(folder)
  return {
    'name': tuning.name,
    'method': tuning.method,
    'epsilon': tuning.epsilon,
    'learning_rate': tuning.learning_rate,
    'exact_match': results[_SCORE],
    'character_accuracy': results[_CHARACTERS],
    'share': 100 * facts['free_parameters'] / facts['parameters'],
    **facts,
  }


def plot(rows: Sequence[dict[str, Any]], path: pathlib.Path) -> None:
  """Draws score against budget, like the paper's Fig. 1, to a PNG file."""
  import matplotlib

  matplotlib.use('Agg')
  import matplotlib.pyplot as plt

  figure, axes = plt.subplots(figsize=(6.4, 4.2), dpi=150)
  styles = {'dst': ('o-', 'DST'), 'random': ('s--', 'random subset')}
  for method, (style, label) in styles.items():
    points = sorted(
      (100 * row['free_parameters'] / row['parameters'], row['exact_match'])
      for row in rows
      if row['method'] == method
    )
    axes.plot(*zip(*points, strict=True), style, label=label)
  for name, label, line, x, align in (
    ('full', 'full fine-tuning', ':', 0.01, 'left'),
    ('zero-shot', 'zero-shot', '-.', 0.99, 'right'),
  ):
    score = next(r['exact_match'] for r in rows if r['name'] == name)
    axes.axhline(score, color='0.4', linestyle=line)
    axes.annotate(
      f'{label} {score:.1f}',
      (x, score),
      xycoords=('axes fraction', 'data'),
      xytext=(0, 3),
      textcoords='offset points',
      ha=align,
      color='0.3',
    )
  axes.set_xscale('log')
  axes.set_ylim(-4, 108)
  axes.set_xlabel('free parameters (% of the model)')
  axes.set_ylabel('exact match (%)')
  axes.set_title('A new operation for a tiny pretrained T5 1.1')
  axes.grid(alpha=0.3)
  axes.legend(loc='center right')
  figure.tight_layout()
  figure.savefig(path)
  plt.close(figure)


def demo(output: pathlib.Path) -> list[dict[str, Any]]:
  """Runs the whole demonstration.

  Args:
    output: the folder for the runs, `results.json` and `score_vs_budget.png`.

  Returns:
    The rows of the table.

  Raises:
    UserError: the folder cannot be written to.
  """
  started = time.time()
  object_stores.check_writable('--output', epath.Path(output))
  # Runs of the same shapes share compiled programs.
  jax.config.update('jax_compilation_cache_dir', str(output / '.compiled'))
  seed = output / 'seed'
  pretrain(seed)
  before = zero_shot(seed, output / 'zero_shot')
  rows = []
  for tuning in TUNINGS:
    tune(tuning, seed, output / tuning.name)
    rows.append(row_of(tuning, output / tuning.name))
  zero_shot_row = demonstrations.zero_shot_row(
    rows[0],
    output / 'zero_shot',
    exact_match=before[_SCORE],
    character_accuracy=before[_CHARACTERS],
  )
  rows.insert(0, zero_shot_row)
  (output / 'results.json').write_text(json_text.dumps(rows, indent=2) + '\n')
  plot(rows, output / 'score_vs_budget.png')
  best = output / 'dst_1e-3'
  print(f'\n{demonstrations.table(rows, _COLUMNS)}\n')
  print(f'{time.time() - started:.0f} s in all')
  print(f'table and picture   {output}/results.json, score_vs_budget.png')
  print(f'subset file         {artifacts.subset_file(best)}')
  print(f'TensorBoard         tensorboard --logdir {output}')
  print(f'tables and figures  python -m dst_t5x.analysis.report {output}')
  return rows


def main() -> None:
  """Runs the command."""
  parser = command_line.Parser(description=__doc__.splitlines()[0])
  parser.add_argument(
    '--output', type=pathlib.Path, default=pathlib.Path('runs/demo')
  )
  arguments = parser.parse_args()
  binaries.perform(lambda: demo(arguments.output.expanduser()))
