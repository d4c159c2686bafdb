"""The demonstration with fewer steps: its files after one and two calls."""

import json

import pytest

from dst_t5x import subsets
from dst_t5x.analysis import report
from dst_t5x.core.errors import UserError
from dst_t5x.runs import demo
from dst_t5x.runs import demonstrations


def _cut_short(monkeypatch):
  kept = ('full', 'dst_1e-2', 'random_1e-2')
  monkeypatch.setattr(demo, '_PRETRAIN_STEPS', 40)
  monkeypatch.setattr(demo, '_STEPS', 4)
  call = demonstrations.call
  monkeypatch.setattr(
    demonstrations,
    'call',
    lambda *given: call(*given, '--gin.EVAL_EXAMPLES=64'),
  )
  monkeypatch.setattr(
    demo, 'TUNINGS', tuple(t for t in demo.TUNINGS if t.name in kept)
  )


@pytest.mark.slow
def test_demo_leaves_table_picture_and_subset_twice(
  tmp_path, monkeypatch, capsys
):
  _cut_short(monkeypatch)
  rows = demo.demo(tmp_path)
  printed = capsys.readouterr().out

  assert [row['name'] for row in rows] == [
    'zero-shot',
    'full',
    'dst_1e-2',
    'random_1e-2',
  ]
  assert json.loads((tmp_path / 'results.json').read_text()) == rows
  assert (tmp_path / 'score_vs_budget.png').read_bytes()[1:4] == b'PNG'
  for row in rows:
    assert row['name'] in printed
    assert 0 <= row['exact_match'] <= 100
  _, full, dst, drawn = rows
  assert full['free_parameters'] == full['parameters'] == 886_528
  budget = round(0.01 * 886_528)
  assert 0.8 * budget < dst['free_parameters'] <= budget
  assert 0.8 * budget < drawn['free_parameters'] <= budget
  file = tmp_path / 'dst_1e-2' / 'last.dst'
  assert subsets.load(file)[0].size == dst['free_parameters']
  assert dst['bytes'] == file.stat().st_size < full['bytes'] / 20
  assert full['seconds_per_step'] > 0

  # A second call finds everything done, and says the same.
  assert demo.demo(tmp_path) == rows

  # What it says last: the runs are reported, its own table is none of them.
  capsys.readouterr()
  assert report.main([str(tmp_path)]) == 0
  captured = capsys.readouterr()
  assert captured.out.startswith('5 runs: 5 finished.\n')
  assert 'damaged' not in captured.err
  assert (
    tmp_path / 'report' / 'figures' / 'figure_6_demo_finetune.png'
  ).exists()


@pytest.mark.parametrize('kind', ['file', 'link', 'below a file'])
def test_an_output_that_is_no_folder(tmp_path, kind):
  path = tmp_path / 'there'
  if kind == 'link':
    path.symlink_to(tmp_path / 'gone')
  else:
    path.write_text('mine')
  output = path / 'x' if kind == 'below a file' else path
  with pytest.raises(UserError) as caught:
    demo.demo(output)
  reason = f'a link to {tmp_path}/gone, which is not there'
  assert str(caught.value) == (
    f'--output {output} cannot be written to: {path} is '
    + (reason if kind == 'link' else 'a file')
  )
