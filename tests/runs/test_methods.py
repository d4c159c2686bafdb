"""Every method as a user runs it: what it trains and writes."""

import json

import commands
import numpy as np
import pytest

from dst_t5x.checkpoints import run_folder
from dst_t5x.checkpoints import seeds
from dst_t5x.core import parts

# Method -> parameters that it trains, of the toy model: 39,328 of its own.
_TRAINED = {
  'lora': 4 * 2 * 8 * (32 + 16),
  'rslora': 4 * 2 * 8 * (32 + 16),
  'dora': 4 * 2 * (8 * (32 + 16) + 16),
  'pissa': 4 * 2 * 8 * (32 + 16),
  'vera': 4 * 2 * (256 + 16),
  'prompt': 10 * 32,
  'ia3': 4 * 2 * 16 + 3 * 48,
  'norms': 32 * (2 * 2 + 3 + 2),
  'head_only': 32 * 264,
}


def _train(seed, method, folder, steps):
  commands.call(
    'train',
    *commands.finetune(seed, method),
    *commands.flags(MODEL_DIR=folder, TRAIN_STEPS=steps, EVAL_EXAMPLES=4),
  )


@pytest.fixture(scope='module', params=_TRAINED)
def run(request, toy_seed, tmp_path_factory):
  """The name and the folder of a method's run of 12 steps."""
  folder = tmp_path_factory.mktemp('methods') / request.param
  _train(toy_seed, request.param, folder, 12)
  return request.param, folder


def test_a_run_is_resumed_to_the_bit(run, toy_seed, tmp_path):
  method, folder = run
  for steps in 7, 12:
    _train(toy_seed, method, tmp_path / 'in two', steps)
  assert commands.fingerprint(tmp_path / 'in two') == (
    commands.fingerprint(folder)
  )


def test_exactly_its_own_parameters_changed(run, toy_seed):
  method, folder = run
  before = parts.flatten(seeds.load_seed(toy_seed).params)
  after = parts.flatten(seeds.load_seed(folder).params)
  own = {
    path
    for path, tensor in after.items()
    if path not in before or tensor.tobytes() != before[path].tobytes()
  }
  assert before.keys() <= after.keys()
  assert sum(after[path].size for path in own) == _TRAINED[method]
  about = run_folder.RunFolder(folder, read_only=True)
  saved = parts.flatten(about.parameters(12)['dense'])
  about.close()
  assert saved.keys() == own
  # Not one of a tensor's parameters need have moved, but most do.
  for path in own & before.keys():
    assert np.mean(after[path] != before[path]) > 0.5, path


def test_what_it_trains_is_reported(run):
  method, folder = run
  report = json.loads((folder / 'report.json').read_text())
  rows = (folder / 'metrics.jsonl').read_text().splitlines()
  (row,) = [r for r in map(json.loads, rows) if 'free/total' in r][-1:]
  assert report['free'] == row['free/total'] == _TRAINED[method]
  assert report['parameters'] == 39_328
  assert (
    report['fraction'] == row['free/fraction'] == (_TRAINED[method] / 39_328)
  )
  assert report['results']['eval/loss'] > 0


def test_eval_needs_no_word_of_the_method(run, tmp_path):
  _, folder = run
  commands.call(
    'eval',
    commands.TOY,
    '--gin_file=gin/runs/eval.gin',
    '--gin.EVAL_EXAMPLES=4',
    *commands.flags(CHECKPOINT_PATH=folder, EVAL_OUTPUT_DIR=tmp_path),
  )
  results = json.loads((tmp_path / 'results.json').read_text())
  report = json.loads((folder / 'report.json').read_text())
  assert results['eval/loss'] == pytest.approx(
    report['results']['eval/loss'], abs=1e-6
  )


def test_no_churn_with_a_warm_up_trains(toy_seed, tmp_path, caplog):
  commands.call(
    'train',
    *commands.finetune(toy_seed, 'dst_no_churn'),
    *commands.flags(
      MODEL_DIR=tmp_path,
      EPSILON=0.01,
      TRAIN_STEPS=6,
      LOG_PERIOD=1,
      LEARNING_RATE_WARMUP_STEPS=4,
      EVAL_EXAMPLES=4,
    ),
  )
  lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
  free = [
    row['free/total'] for row in map(json.loads, lines) if 'free/total' in row
  ]
  assert free == [0] + [393] * 5  # The first step's learning rate is 0.
  report = json.loads((tmp_path / 'report.json').read_text())
  assert report['free'] == report['budget'] == 393
  assert report['fraction'] == 393 / 39_328
  assert 'NOTHING IS TRAINED' not in caplog.text


def test_what_trains_nothing_says_so(toy_seed, tmp_path, caplog):
  """Here the updates are lost in the rounding of the parameters."""
  commands.call(
    'train',
    *commands.finetune(toy_seed, 'dst_no_churn'),
    *commands.flags(
      MODEL_DIR=tmp_path,
      EPSILON=0.01,
      TRAIN_STEPS=4,
      LOG_PERIOD=1,
      LEARNING_RATE=1e-30,
      EVAL_EXAMPLES=4,
    ),
  )
  assert caplog.text.count('NOTHING IS TRAINED: step 1 moved no free') == 1
  assert 'the subset is empty' in caplog.text
  report = json.loads((tmp_path / 'report.json').read_text())
  assert (report['free'], report['fraction'], report['budget']) == (0, 0, 393)
