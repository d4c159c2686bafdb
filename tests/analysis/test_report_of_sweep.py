"""The report of a real sweep of a tiny model, against what the runs say."""

import csv
import json
import shutil

import commands
import jax
import numpy as np
import pytest

from dst_t5x.analysis import report
from dst_t5x.checkpoints import seeds
from dst_t5x.config import binaries
from dst_t5x.core import metrics_file
from dst_t5x.launch import grid
from dst_t5x.launch import states
from dst_t5x.runs import training
from dst_t5x.subsets import fingerprint

_SWEEP = """
model: {model}
method: dst
INITIAL_CHECKPOINT_PATH: {seed}
TRAIN_STEPS: 20
BATCH_SIZE: 16
EVAL_PERIOD: 20
EVAL_EXAMPLES: 4
CHECKPOINT_PERIOD: 10
KEEP: 2
DROPOUT_RATE: 0.1
EPSILON: [1e-2]
RANDOM_SEED: [0, 1, 2]
"""


@pytest.fixture(scope='module')
def sweep(toy_seed, tmp_path_factory):
  """A sweep of which one run of three is not there."""
  root = tmp_path_factory.mktemp('sweep')
  file = root / 'toy.yaml'
  model = commands.TESTS / 'toy.gin'
  file.write_text(_SWEEP.format(model=model, seed=toy_seed))
  runs = grid.read(str(file))
  found = states.Sweep(runs, str(root / 'runs'))
  for run in runs[:2]:
    binaries.parse(run.flags(found.folder(run.name)), training.train)()
  found.write(found.states().values())
  return root / 'runs'


@pytest.fixture(scope='module')
def made(sweep, tmp_path_factory):
  """The report, and where it is."""
  output = tmp_path_factory.mktemp('report')
  return report.make([sweep], output), output


def _rows(output, name):
  with (output / 'tables' / f'{name}.csv').open() as file:
    return list(csv.DictReader(file))


def _free(folder, step, seed):
  """Returns the places where a checkpoint differs from the seed."""
  tuned = seeds.load_run(folder, step).params
  old = dict(fingerprint.tensors(seed))
  return {
    (path, i)
    for path, new in fingerprint.tensors(jax.tree.map(np.asarray, tuned))
    for i in np.flatnonzero(new != old[path]).tolist()
  }


def test_scores_and_budgets_are_those_of_the_runs(sweep, made):
  result, output = made
  assert not result.problems
  rows = {row['run']: row for row in _rows(output, 'runs')}
  assert sorted(row['state'] for row in rows.values()) == [
    'finished',
    'finished',
    'missing',
  ]
  (row,) = _rows(output, 'settings_toy')
  left = [json.loads(path.read_text()) for path in sweep.glob('*/report.json')]
  scores = [of_run['results']['toy/exact_match'] for of_run in left]
  assert row['model'] == 'toy'
  assert float(row['dev']) == pytest.approx(np.mean(scores))
  assert float(row['dev spread']) == pytest.approx(np.std(scores, ddof=1))
  assert row['dev runs'] == '2'
  assert (
    [of_run['free'] for of_run in left] == [int(row['free'])] * 2 == [393] * 2
  )
  assert row['runs missing'] == '1'
  (figure,) = [f for f in result.figures if f.name == 'figure_6_toy']
  assert '1 of 3 runs of 1 settings are missing' in figure.caption


def test_overlaps_are_those_of_the_parameters(sweep, made, toy_seed, tmp_path):
  _, output = made
  seed = seeds.load_seed(toy_seed).merged().params
  (folder,) = sweep.glob('*_seed=0')
  first, last = (_free(folder, step, seed) for step in (10, 20))
  assert 0 < len(first & last) < len(first)
  (row,) = _rows(output, 'overlap_checkpoints_toy')
  assert (row['step'], row['later step']) == ('10', '20')
  assert int(row['shared']) == len(first & last)
  expected = len(first & last) / len(first)
  assert float(row['Eq. 9 (%)']) == pytest.approx(100 * expected)
  saved = [r for r in metrics_file.read(folder) if 'overlap/first' in r]
  assert saved == [
    {'step': 20, 'overlap/first': expected, 'overlap/last_saved': expected}
  ]
  # A run of which no subset files were kept has checkpoints.
  copied = shutil.copytree(folder, tmp_path / 'copied')
  shutil.rmtree(copied / 'subsets')
  report.make([copied], tmp_path / 'out')
  (again,) = _rows(tmp_path / 'out', 'overlap_checkpoints_toy')
  assert {**again, 'run': ''} == {**row, 'run': ''}
  # Between runs.
  (other,) = sweep.glob('*_seed=1')
  theirs = _free(other, 20, seed)
  (row,) = _rows(output, 'overlap_runs')
  assert int(row['shared']) == len(last & theirs)
  jaccard = 100 * len(last & theirs) / len(last | theirs)
  assert float(row['Jaccard (%)']) == pytest.approx(jaccard)


def test_modules_are_counted_as_training_counts_them(sweep, made):
  _, output = made
  rows = {
    row['module']: float(row['of all free (%)'])
    for row in _rows(output, 'modules_toy')
  }
  reported = [
    [row for row in metrics_file.read(folder) if 'free/total' in row][-1]
    for folder in sweep.glob('*_seed=[01]')
  ]
  assert len(reported) == 2
  shares = {
    name: 100 * np.mean([row[name] for row in reported])
    for name in reported[0]
    if name.startswith('share/')
  }
  assert sum(shares.values()) == pytest.approx(100)
  assert rows['embeddings'] == pytest.approx(shares['share/token_embedder'])
  norms = sum(v for name, v in shares.items() if 'norm' in name)
  assert rows['layer norms'] == pytest.approx(norms)
  assert rows['cross-attention'] == pytest.approx(
    shares['share/decoder/encoder_decoder_attention']
  )


def test_what_eval_leaves_is_the_test_score(sweep, toy_seed, tmp_path):
  (first,) = sweep.glob('*_seed=0')
  copied = shutil.copytree(first, tmp_path / 'runs' / 'run')
  shared = [commands.TOY, '--gin_file=gin/runs/eval.gin']
  folders = {copied / 'last.dst': 'run/test', toy_seed: 'zero_shot'}
  for checkpoint, name in folders.items():
    commands.call(
      'eval',
      *shared,
      *commands.flags(
        CHECKPOINT_PATH=checkpoint,
        EVAL_OUTPUT_DIR=tmp_path / 'runs' / name,
        EVAL_SPLIT='test',
        EVAL_EXAMPLES=4,
      ),
    )
  report.make([tmp_path / 'runs'], tmp_path / 'out')
  rows = _rows(tmp_path / 'out', 'settings_toy')
  assert {row['model'] for row in rows} == {'0.0393M'}
  scores = {
    name: json.loads((tmp_path / 'runs' / name / 'results.json').read_text())
    for name in folders.values()
  }
  for row, name in zip(rows, ('run/test', 'zero_shot'), strict=True):
    assert float(row['test']) == scores[name]['toy/exact_match']
  (table,) = _rows(tmp_path / 'out', 'table_6_0.0393M_toy')[:1]
  assert table['method'] == 'zero-shot'
