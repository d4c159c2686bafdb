"""What is kept of a sweep's runs."""

import json

import pytest

from dst_t5x.core.errors import UserError
from dst_t5x.launch import grid
from dst_t5x.launch import records
from dst_t5x.launch import states

_SCORES = {
  'gsm8k/strict_match': 12.5,
  'held_out/loss': 2.5,
  'held_out/forgetting': 0.25,
}


def _sweep(tmp_path):
  """A sweep of two runs, one of which has finished."""
  path = tmp_path / 'mine.yaml'
  path.write_text(
    'task: gsm8k\nmethod: full\nTRAIN_STEPS: 30\nLEARNING_RATE: [0.1, 0.2]\n'
  )
  sweep = states.Sweep(grid.read(str(path)), str(tmp_path / 'mine'))
  folder = sweep.folder('gsm8k_full_learning_rate=0.1')
  folder.mkdir(parents=True)
  results = {'step': 30, 'eval/loss': 0.5, **_SCORES}
  report = {'step': 30, 'free': 7, 'parameters': 70, 'file_bytes': None}
  (folder / 'report.json').write_text(
    json.dumps(report | {'devices': '1 × cpu', 'results': results})
  )
  rows = [{'step': s, 'speed/steps_per_second': s / 10} for s in (10, 20, 30)]
  rows[-1] |= {'free/total': 7, 'free/a': 7, 'free/b': 0} | {
    'share/a': 1.0,
    'share/b': 0.0,
  }
  (folder / 'metrics.jsonl').write_text(
    ''.join(json.dumps(row) + '\n' for row in [*rows, results])
  )
  sweep.write(sweep.states().values())
  return tmp_path / 'mine'


def test_a_line_for_each_run(tmp_path, capsys):
  folder = _sweep(tmp_path)
  assert records.main([str(folder)]) == 0
  done, waiting = map(json.loads, capsys.readouterr().out.splitlines())
  assert done['sweep'] == 'mine'
  assert done['settings']['LEARNING_RATE'] == '0.1'
  assert done['scores'] == _SCORES | {'eval/loss': 0.5}
  assert (done['free'], done['parameters'], done['step']) == (7, 70, 30)
  assert done['steps_per_second'] == 2.5
  assert done['modules'] == {'a': 7}
  assert done['state'] == 'finished'
  assert waiting['state'] == 'waiting'
  assert 'scores' not in waiting


def test_no_sweep_is_one_line(tmp_path, capsys):
  with pytest.raises(UserError, match='no folder of a sweep'):
    list(records.records(tmp_path))
  assert records.main([str(tmp_path)]) == 1
  assert capsys.readouterr().err.startswith('error: ')
