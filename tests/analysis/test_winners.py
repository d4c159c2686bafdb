"""Who wins at which budget, forgetting, and figures of many methods."""

import csv
import io
import json
import math

import analysis_runs
import numpy as np
import pytest
from scipy import stats

from dst_t5x.analysis import cells as cells_lib
from dst_t5x.analysis import folders
from dst_t5x.analysis import intervals
from dst_t5x.analysis import kinds
from dst_t5x.analysis import report
from dst_t5x.analysis import score_figures
from dst_t5x.analysis import setups
from dst_t5x.checkpoints import best

# Random seed -> score on the test split, by method, and by budget.
_SEEDS = (1, 2, 3)
_DST = {0.01: (70.0, 74.0, 72.0), 0.1: (80.0, 85.0, 84.0)}
_SPIEL = {0.01: (69.0, 72.5, 71.0), 0.1: (83.0, 88.5, 86.0)}


def _write(root, method, scores, dev=0.0, **settings):
  """Writes runs with a score on each split, for each random seed."""
  for seed, score in zip(_SEEDS, scores, strict=True):
    analysis_runs.write(
      root / f'{method}_{len(list(root.iterdir()))}',
      score + dev,
      test=score,
      method=method,
      random_seed=seed,
      **settings,
    )


def _rows(output, name):
  text = (output / 'tables' / f'{name}.csv').read_text()
  return list(csv.DictReader(io.StringIO(text)))


@pytest.fixture(scope='module')
def written(tmp_path_factory):
  """The folder of a report of several methods."""
  root = tmp_path_factory.mktemp('winners') / 'runs'
  root.mkdir()
  for epsilon in _DST:
    _write(root, 'dst', _DST[epsilon], epsilon=epsilon, forgetting=epsilon)
    _write(
      root,
      'spiel',
      _SPIEL[epsilon],
      epsilon=epsilon,
      silos='none',
      forgetting=2 * epsilon,
    )
  # Of these, one is within a hundredth of the budget, and one beyond.
  _write(root, 'rslora', (60.0, 61.0, 62.0), rank=2, free=606)
  _write(root, 'lora', (99.0, 99.0, 99.0), rank=2, free=607)
  # Two configurations of a method: the development split chooses the first.
  for where, score, dev in (('none', 50.0, 5.0), ('per_module', 54.0, 0.0)):
    _write(root, 'fish', [score] * 3, dev, epsilon=0.01, silos=where)
  _write(root, 'fish', [40.0] * 3, epsilon=0.1, silos='per_module')
  _write(root, 'full', (90.0, 91.0, 92.0), forgetting=0.9)
  output = root.parent / 'report'
  made = report.make([root], output)
  assert not made.problems
  return output


def _at(output, budget):
  rows = _rows(output, 'winners_sort_0.006M')
  return {row['method']: row for row in rows if row['budget'] == budget}


def test_the_best_is_first_and_its_interval_is_student_s(written):
  found = _at(written, 'ε = 0.01')
  assert list(found) == ['DST', 'SpIEL', 'FISH mask']
  row = found['DST']
  scores = _DST[0.01]
  assert float(row['score']) == pytest.approx(np.mean(scores))
  low, high = stats.t.interval(
    0.95, 2, np.mean(scores), stats.sem(scores, ddof=1)
  )
  assert float(row['± 95 %']) == pytest.approx((high - low) / 2)
  assert (row['runs'], row['less the winner'], row['pairs']) == ('3', '', '')
  assert (row['parameters'], row['free']) == ('60', '60')


def test_differences_are_paired_by_the_random_seed(written):
  row = _at(written, 'ε = 0.01')['SpIEL']
  off = stats.ttest_rel(_SPIEL[0.01], _DST[0.01]).confidence_interval()
  assert float(row['less the winner']) == pytest.approx(
    np.mean(np.subtract(_SPIEL[0.01], _DST[0.01]))
  )
  assert float(row['low']) == pytest.approx(off.low)
  assert float(row['high']) == pytest.approx(off.high)
  assert row['pairs'] == '3'


def test_what_counts_is_the_number_that_differs(written):
  found = _at(written, 'ε = 0.1')
  assert list(found) == ['SpIEL', 'DST', 'rsLoRA', 'FISH mask']
  assert found['rsLoRA']['free'] == '606'
  assert found['rsLoRA']['setting'] == 'rank = 2'


def test_the_development_split_chooses_the_configuration(written):
  row = _at(written, 'ε = 0.01')['FISH mask']
  assert row['setting'] == 'ε = 0.01, silos none'
  assert float(row['score']) == 50.0


def test_the_lowest_loss_wins(written, tmp_path):
  root = written.parent / 'runs'
  report.make([root], tmp_path, metric='eval/loss', split='validation')
  note = (tmp_path / 'tables' / 'winners_sort_0.006M.md').read_text()
  assert "eval/loss of the split 'validation', the lowest first" in note
  assert 'The shown scores chose the configurations, too.' in note


def test_only_common_random_seeds_are_paired():
  off = intervals.of_difference({1: 3.0, 2: 5.0, 3: 9.0}, {2: 4.0, 3: 6.0})
  assert (off.mean, off.number) == (2.0, 2)
  assert off.half == pytest.approx(stats.t.ppf(0.975, 1) * 1.0)
  assert off.signed(1) == '+2.0 [-10.7, +14.7]'
  assert math.isnan(intervals.of_difference({1: 3.0}, {1: 2.0}).half)
  assert math.isnan(intervals.of_difference({1: 3.0}, {2: 2.0}).mean)


def test_forgetting_has_a_figure_and_a_column(written, tmp_path):
  page = (written / 'report.html').read_text()
  assert 'id="forgetting_sort_0.006M"' in page
  png = (written / 'figures' / 'forgetting_sort_0.006M.png').read_bytes()
  assert png.startswith(b'\x89PNG')
  report.make([written.parent / 'runs'], tmp_path, split='validation')
  rows = _rows(tmp_path, 'table_6_0.006M_sort')
  found = {row['setting']: row['held_out/forgetting'] for row in rows}
  assert float(found['ε = 0.1, silos none']) == pytest.approx(0.2)
  assert found['rank = 2'] == ''


def test_without_held_out_text_or_rivals_there_is_neither(tmp_path):
  (tmp_path / 'runs').mkdir()
  _write(tmp_path / 'runs', 'dst', (1.0, 2.0, 3.0), epsilon=0.01)
  made = report.make([tmp_path / 'runs'], tmp_path / 'out')
  assert not [f for f in made.figures if f.name.startswith('forgetting')]
  assert not [t for t in made.tables if t.name.startswith('winners')]


def test_a_method_that_nobody_knows_has_its_budget_and_its_settings():
  record = analysis_runs.record(
    'sort', 'mine', 0.1, 7, epsilon=0.01, silos='none', every=20, exclude=[]
  )
  record['method']['random_seed'] = 7
  setup = setups.from_run(record, 'small').setup
  assert (setup.epsilon, setup.budget) == (0.01, 'ε = 0.01')
  assert setup.variant == 'silos none, every 20'
  record = analysis_runs.record('sort', 'ours', 0.1, 7, rank=4, alpha=8)
  setup = setups.from_run(record, 'small').setup
  assert (setup.epsilon, setup.budget) == (None, 'rank = 4')
  assert setup.variant == 'alpha 8'


_MANY = (
  *('dst', 'random', 'lora', 'rslora', 'dora', 'pissa', 'vera', 'prompt'),
  *('ia3', 'shira_random', 'super_tuning', 'pafi', 'fish', 'child_tuning'),
  *('shira_snip', 'shira_magnitude', 'lt_sft', 'spiel', 'mine', 'yours'),
)


def _setup(method):
  knob = {'mine': 'ε', 'yours': 'rank'}.get(method, '')
  return setups.Setup('', '', method, 1.0, knob_name=knob)


def test_many_methods_are_in_panels_by_kind():
  few = dict.fromkeys(_MANY[:8], 0)
  of = {method: _setup(method) for method in _MANY}
  assert kinds.split(few, of) == [('', few)]
  panels = kinds.split(dict.fromkeys(_MANY, 0), of)
  assert all(next(iter(part)) == 'dst' for _, part in panels)
  assert all(len(part) <= kinds.MOST for _, part in panels)
  shown = [method for _, part in panels for method in list(part)[1:]]
  assert sorted(shown) == sorted(set(_MANY) - {'dst'})
  of_title = {title: set(part) - {'dst'} for title, part in panels}
  assert of_title['other subsets'] == {'mine'}
  assert of_title['low rank'] == {
    *('lora', 'rslora', 'dora', 'pissa', 'vera', 'yours')
  }
  assert {'subset chosen once (1 of 2)', 'subset chosen once (2 of 2)'} <= (
    of_title.keys()
  )


def test_a_figure_of_many_methods_is_larger(tmp_path):
  sizes = {}
  for number in (8, 9):
    root = tmp_path / str(number)
    root.mkdir()
    for i, method in enumerate(('dst', *_MANY[9:])[:number]):
      analysis_runs.write(
        root / method, 50.0 + i, method=method, epsilon=0.01, forgetting=0.1
      )
    made = report.make([root], tmp_path / f'out_{number}')
    figures = {figure.name: figure for figure in made.figures}
    for name in ('figure_6_sort', 'forgetting_sort_0.006M'):
      sizes[name, number] = figures[name].width
  for name in ('figure_6_sort', 'forgetting_sort_0.006M'):
    assert sizes[name, 9] > sizes[name, 8]


def test_forgetting_is_best_where_it_is_lowest():
  for name in ('held_out/loss', 'held_out/forgetting', 'eval/bits_per_byte'):
    assert best.is_lower_better(name)
  assert not best.is_lower_better('gsm8k/strict_match')
  rows = [
    {'step': s, 'held_out/forgetting': x, 'sort/exact_match': 1.0}
    for s, x in ((1, 0.5), (2, -0.1), (3, 0.2))
  ]
  found = best.find_best(rows, 'held_out/forgetting', [1, 2, 3])
  assert (found['step'], found['scores']) == (2, {'sort/exact_match': 1.0})
  assert json.loads(json.dumps(found)) == found


def test_a_curve_has_the_best_settings_of_each_budget(written):
  found = folders.read([written.parent / 'runs'], pytest.fail)
  metric = cells_lib.metric_of(found, 'sort', '')
  cells = cells_lib.make(found, metric)
  scores = score_figures.Scores('sort', cells, metric, cells_lib.TEST)
  curve = scores.curves(cells[0].setup.model)['fish']
  assert [(c.setup.knob, c.setup.variant) for c in curve] == [
    (0.01, 'silos none'),
    (0.1, 'silos per_module'),
  ]
