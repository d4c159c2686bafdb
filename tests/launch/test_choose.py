"""A sweep of the best of another's runs."""

import json

import pytest

from dst_t5x.launch import choose
from dst_t5x.launch import grid

_SEARCH = """
model: tiny
task: gsm8k
TRAIN_STEPS: 10
RANDOM_SEED: [0, 1]
grids:
- method: dst
  EPSILON: [1e-3, 1e-2]
  SILOS: ["'none'"]
  LEARNING_RATE: [0.1, 1.0]
- method: full
  LEARNING_RATE: [0.01, 0.02]
"""
_SCORE = 'gsm8k/strict_match'


def _finish(folder, score):
  folder.mkdir(parents=True)
  results = {'step': 10, 'eval/loss': 1, _SCORE: score}
  results['held_out/forgetting'] = score / 100
  report = {'step': 10, 'results': results}
  (folder / 'report.json').write_text(json.dumps(report))


def _score(name):
  """At the smaller budget 1.0 is best, but for one random seed; else not."""
  if 'full' in name:
    return 50.0
  if 'epsilon=1e-3' in name:
    lucky = 'random_seed=0' in name and 'learning_rate=0.1' in name
    return 60.0 if lucky else 30.0 + 20.0 * ('learning_rate=1.0' in name)
  return 70.0 - 10.0 * ('learning_rate=1.0' in name)


def _search(tmp_path):
  path = tmp_path / 'search.yaml'
  path.write_text(_SEARCH)
  for run in grid.read(str(path)):
    _finish(tmp_path / 'runs' / run.name, _score(run.name))
  return path, tmp_path / 'runs'


def _choose(*arguments):
  return choose.main(list(map(str, arguments)))


def test_the_best_of_each_cell_with_new_random_seeds(tmp_path, capsys):
  path, output = _search(tmp_path)
  command = path, f'--output={output}', f'--by={_SCORE}'
  added = '--gin.RANDOM_SEED=1,2,3', '--gin.EVAL_SPLIT=test'
  assert _choose(*command, *added) == 0
  text = capsys.readouterr().out
  assert '# 0.1: 45, 1.0: 50' in text
  final = tmp_path / 'final.yaml'
  final.write_text(text)
  runs = grid.read(str(final))
  chosen = {
    (s['method'], s.get('EPSILON')): s['LEARNING_RATE']
    for s in (run.settings for run in runs)
  }
  assert chosen == {
    ('dst', '1e-3'): '1.0',
    ('dst', '1e-2'): '0.1',
    ('full', None): '0.01',
  }
  assert len({run.name for run in runs}) == len(runs) == 9
  kept = {'model': 'tiny', 'task': 'gsm8k', 'TRAIN_STEPS': '10'}
  for run in runs:
    assert run.settings.items() >= (kept | {'EVAL_SPLIT': 'test'}).items()
    is_dst = run.settings['method'] == 'dst'
    assert run.settings.get('SILOS') == ("'none'" if is_dst else None)
  assert {run.settings['RANDOM_SEED'] for run in runs} == {'1', '2', '3'}


def test_what_forgets_least_is_best(tmp_path, capsys):
  path, output = _search(tmp_path)
  by = '--by=held_out/forgetting'
  assert _choose(path, f'--output={output}', '--only=*1e-2*', by) == 0
  assert 'LEARNING_RATE: [1.0]' in capsys.readouterr().out


def test_what_failed_is_not_chosen(tmp_path, capsys):
  path, output = _search(tmp_path)
  for lost in output.glob('*_dst_*seed=1_epsilon=1e-2_*_rate=0.1'):
    (lost / 'report.json').unlink()
    (lost / 'log.txt').write_text('error: the loss is nan\n')
  assert _choose(path, f'--output={output}', f'--by={_SCORE}') == 0
  assert '# 0.1: failed, 1.0: 60' in capsys.readouterr().out


def test_what_is_not_there_is_one_line(tmp_path, capsys):
  path, output = _search(tmp_path)

  def error(*arguments):
    assert _choose(path, f'--output={output}', *arguments) == 1
    return capsys.readouterr().err

  assert "no 'gsm8k/strict'; did you mean" in error('--by=gsm8k/strict')
  assert 'does not set MICROBATCHES' in error(
    f'--by={_SCORE}', '--over=MICROBATCHES'
  )
  assert 'needs a value' in error(f'--by={_SCORE}', '--gin.RANDOM_SEED=')
  report = next(output.glob('*full*')) / 'report.json'
  report.unlink()
  assert 'is waiting: finish the sweep' in error(f'--by={_SCORE}')


def test_some_runs(tmp_path, capsys):
  path, output = _search(tmp_path)
  next(output.glob('*=1e-2*')).joinpath('report.json').unlink()
  command = path, f'--output={output}', f'--by={_SCORE}'
  patterns = '--only=*_full_*', '--only=*epsilon=1e-3*'
  assert _choose(*command, *patterns) == 0
  text = capsys.readouterr().out
  assert 'method: full' in text
  assert '1e-3' in text
  assert '1e-2' not in text
  assert _choose(*command, '--only=nothing') == 1
  assert 'there is no such run' in capsys.readouterr().err


def test_the_metric_has_to_be_said(capsys):
  with pytest.raises(SystemExit):
    _choose('search.yaml')
  assert '--by' in capsys.readouterr().err


@pytest.mark.parametrize('by', ['eval/loss', 'gsm8k/loss'])
def test_of_a_loss_the_lowest_is_chosen(tmp_path, capsys, by):
  path, output = _search(tmp_path)
  losses = {'0.1': 2.0, '1.0': 1.0, '0.01': 0.5, '0.02': 0.75}
  for folder in output.iterdir():
    rate = folder.name.rpartition('learning_rate=')[2]
    report = {'step': 10, 'results': {'step': 10, by: losses[rate]}}
    (folder / 'report.json').write_text(json.dumps(report))
  assert _choose(path, f'--output={output}', f'--by={by}') == 0
  final = tmp_path / 'final.yaml'
  final.write_text(capsys.readouterr().out)
  chosen = {run.settings['LEARNING_RATE'] for run in grid.read(str(final))}
  assert chosen == {'1.0', '0.01'}


def test_a_cell_whose_runs_all_failed_is_one_line(tmp_path, capsys):
  path, output = _search(tmp_path)
  for lost in output.glob('*_full_*'):
    (lost / 'report.json').unlink()
    (lost / 'log.txt').write_text('error: the loss is nan\n')
  assert _choose(path, f'--output={output}', f'--by={_SCORE}') == 1
  assert 'no run ended well of those with' in capsys.readouterr().err
