"""Decoder-only networks in the commands: training, resumption, inference."""

import json

import commands
import pytest

from dst_t5x import fingerprint
from dst_t5x import subsets
from dst_t5x.adapters import api as adapters
from dst_t5x.analysis import report
from dst_t5x.analysis import watch
from dst_t5x.checkpoints import conversion
from dst_t5x.checkpoints import seeds
from dst_t5x.checkpoints import subset_command
from dst_t5x.config import binaries
from dst_t5x.core import parts
from dst_t5x.engine import budget
from dst_t5x.runs import training

_GIN = f'--gin_file={commands.TESTS / "decoder_only.gin"}'


def _arguments(run, *files, **bindings):
  settings = {'BATCH_SIZE': 16, 'EVAL_EXAMPLES': 4}
  names = (f'{name}.gin' for name in (*files, f'runs/{run}'))
  return [
    _GIN,
    *(f'--gin_file=gin/{name}' for name in names),
    *commands.flags(**settings | bindings),
  ]


def _tune(seed, folder, method, steps, **bindings):
  arguments = _arguments(
    'finetune',
    f'methods/{method}',
    INITIAL_CHECKPOINT_PATH=seed,
    MODEL_DIR=folder,
    TRAIN_STEPS=steps,
    CHECKPOINT_PERIOD=2,
    **bindings,
  )
  commands.call('train', *arguments)
  return json.loads((folder / 'report.json').read_text())


@pytest.fixture(scope='module')
def seed(tmp_path_factory):
  """A run from random parameters, of 6 steps."""
  folder = tmp_path_factory.mktemp('decoder_only') / 'seed'
  bindings = {'MODEL_DIR': folder, 'TRAIN_STEPS': 6, 'LEARNING_RATE': 0.1}
  commands.call('train', *_arguments('pretrain', **bindings))
  return folder


_METHODS = {
  'dst': {'EPSILON': 0.01},
  'dst_no_churn': {'EPSILON': 0.01},
  'random': {'EPSILON': 0.01},
  'lora': {'LORA_RANK': 2, 'LORA_DROPOUT_RATE': 0.1},
  'dora': {'LORA_RANK': 2, 'LORA_DROPOUT_RATE': 0.1},
  'vera': {'LORA_RANK': 8, 'LORA_DROPOUT_RATE': 0.1},
  'ia3': {},
  'prompt': {'PROMPT_LENGTH': 3},
  'norms': {},
  'shira_magnitude': {'EPSILON': 0.01},
  'shira_snip': {'EPSILON': 0.01, 'SCORE_STEPS': 1},
  'lt_sft': {'EPSILON': 0.01, 'FIRST_STEPS': 2},
  'spiel': {
    **{'EPSILON': 0.01, 'INTERVAL': 2},
    **{'SPIEL_ACCUMULATE': 1, 'SPIEL_STEPS': 4},
  },
  'gasdu': {'EPSILON': 0.01, 'INTERVAL': 2},
}


@pytest.mark.slow
@pytest.mark.parametrize('method', _METHODS)
def test_it_is_resumed_to_the_bit(seed, method, tmp_path):
  settings = {**_METHODS[method], 'DROPOUT_RATE': 0.1}
  whole = _tune(seed, tmp_path / 'whole', method, 4, **settings)
  for steps in (2, 4):
    resumed = _tune(seed, tmp_path / 'parts', method, steps, **settings)
  assert resumed['results'] == whole['results']
  assert resumed['free'] == whole['free'] > 0
  one, other = (seeds.load_seed(tmp_path / name) for name in ('whole', 'parts'))
  assert one.fingerprint == other.fingerprint
  base = parts.flatten(seeds.load_seed(seed).params)
  tuned = parts.flatten(one.params)
  added = tuned.keys() - base.keys()
  assert bool(added) == (one.adapter != adapters.NONE)
  if added:
    # What it leaves is the adapter, and of the seed nothing has changed.
    left = seeds.load_seed(tmp_path / 'parts' / 'last_adapter')
    assert left.fingerprint == one.fingerprint
    assert all((tuned[path] == x).all() for path, x in base.items())
    assert whole['free'] == sum(tuned[path].size for path in added)
    conversion.convert(tmp_path / 'parts', tmp_path / 'taken', 'peft')
    taken = seeds.load_seed(tmp_path / 'taken')
    assert taken.fingerprint == one.fingerprint
  else:
    subset, _ = subsets.load(tmp_path / 'parts' / 'last.dst')
    assert 0 < subset.size <= whole['free']
    applied = seeds.load_seed(tmp_path / 'parts' / 'last.dst')
    assert applied.fingerprint == one.fingerprint
  if method == 'norms':
    assert all(
      (tuned[path] == x).all() == (not path.endswith('norm/scale'))
      for path, x in base.items()
    )


@pytest.mark.slow
def test_the_commands_take_its_runs(seed, tmp_path, capsys):
  run, other = tmp_path / 'runs' / 'one', tmp_path / 'runs' / 'two'
  made = _tune(seed, run, 'dst', 4, EPSILON=0.01)
  _tune(seed, other, 'random', 2, EPSILON=0.01)
  assert {'eval/loss', 'toy/exact_match'} <= made['results'].keys()
  where = {'CHECKPOINT_PATH': run}
  flags = commands.flags(
    EVAL_OUTPUT_DIR=tmp_path / 'eval', EVAL_EXAMPLES=4, **where
  )
  commands.call('eval', _GIN, '--gin_file=gin/runs/eval.gin', *flags)
  results = json.loads((tmp_path / 'eval' / 'results.json').read_text())
  expected = made['results']['eval/loss']
  assert results['eval/loss'] == pytest.approx(expected, rel=1e-6)
  flags = commands.flags(INFER_OUTPUT_DIR=tmp_path / 'infer', **where)
  commands.call('infer', _GIN, '--gin_file=gin/runs/infer.gin', *flags)
  lines = (tmp_path / 'infer' / 'predictions.jsonl').read_text().splitlines()
  assert len(lines) == 10

  def command(main, *arguments):
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out

  subset = run / 'last.dst'
  tuned = seeds.load_seed(run)
  printed = command(fingerprint.main, run).split()
  assert printed == ['4', tuned.fingerprint]
  main = subset_command.main
  assert 'decoder/self_attention' in command(main, 'info', subset)
  command(main, 'verify', subset, '--seed', seed)
  command(main, 'overlap', subset, other / 'last.dst')
  both = tmp_path / 'both.dst'
  command(
    main, 'combine', subset, other / 'last.dst', '--rule=mean', '--output', both
  )
  output = tmp_path / 'applied'
  command(main, 'apply', subset, '--seed', seed, '--output', output)
  assert seeds.load_seed(output).fingerprint == tuned.fingerprint
  report.make([tmp_path / 'runs'], tmp_path / 'report')
  assert (tmp_path / 'report' / 'report.html').exists()
  command(watch.main, run)


@pytest.mark.slow
def test_it_is_checked_and_counted_before_training(seed, tmp_path, capsys):
  arguments = _arguments(
    'finetune',
    'methods/dst',
    INITIAL_CHECKPOINT_PATH=seed,
    MODEL_DIR=tmp_path / 'run',
    TRAIN_STEPS=2,
    EPSILON=0.01,
  )
  arguments.append('--gin.training.train.only_check=True')
  binaries.parse(arguments, training.train)()
  assert not (tmp_path / 'run').exists()
  flags = ['--gin_file=gin/runs/budget.gin', _GIN]
  capsys.readouterr()
  binaries.parse([flags[1], flags[0]], budget.show)()
  printed = capsys.readouterr().out
  for method in ('dst', 'lora', 'ia3', 'prompt', 'norms'):
    assert method in printed
