"""The report of runs: its numbers, what is missing or damaged, its files."""

import csv
import html.parser
import io
import itertools
import json
import os
import shutil
import subprocess
import sys

import analysis_runs
import commands
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import numpy as np
import pytest

from dst_t5x.analysis import cells
from dst_t5x.analysis import folders
from dst_t5x.analysis import overlap_figures
from dst_t5x.analysis import planned
from dst_t5x.analysis import report
from dst_t5x.analysis import setups
from dst_t5x.config import binaries
from dst_t5x.launch import grid
from dst_t5x.runs import identity
from dst_t5x.runs import training

# Development score of learning rate and random seed, and the test score of the
# better learning rate: it has the lower scores on the test split.
_DEV = {0.1: (60.0, 62.0, 61.0), 0.5: (70.0, 71.0, 75.0)}
_TEST = {0.1: (90.0, 90.0, 90.0), 0.5: (50.0, 54.0, 55.0)}
_FULL = (80.0, 84.0)


def _write_all(root):
  for rate, seed in itertools.product(_DEV, range(3)):
    analysis_runs.write(
      root / f'dst_{rate}_{seed}',
      _DEV[rate][seed],
      learning_rate=rate,
      random_seed=seed,
      test=_TEST[rate][seed],
      epsilon=0.01,
      subsets=[analysis_runs.random_subset(60, 10 * seed + i) for i in (1, 2)],
    )
  for seed, score in enumerate(_FULL):
    analysis_runs.write(
      root / f'full_{seed}', 70.0, method='full', random_seed=seed, test=score
    )
  return root


@pytest.fixture(scope='module')
def written(tmp_path_factory):
  """The folder of several runs, and that of their report."""
  root = _write_all(tmp_path_factory.mktemp('runs') / 'all')
  output = root.parent / 'report'
  report.make([root], output)
  return root, output


def _rows(output, name):
  text = (output / 'tables' / f'{name}.csv').read_text()
  return list(csv.DictReader(io.StringIO(text)))


def _error(capsys, *arguments):
  assert report.main(list(map(str, arguments))) == 1
  captured = capsys.readouterr()
  assert captured.err.startswith('error: ')
  assert captured.err.count('\n') == 1
  return captured.err


def test_the_learning_rate_is_chosen_by_dev_and_the_test_score_shown(written):
  _, output = written
  (row,) = [r for r in _rows(output, 'settings_sort') if r['method'] == 'dst']
  assert row['learning rate'] == '0.5'
  assert row['tried: dev'] == '0.1: 61, 0.5: 72'
  for split, scores in (('dev', _DEV), ('test', _TEST)):
    assert float(row[split]) == pytest.approx(np.mean(scores[0.5]))
    spread = np.sqrt(
      sum((s - np.mean(scores[0.5])) ** 2 for s in scores[0.5]) / 2
    )
    assert float(row[f'{split} spread']) == pytest.approx(spread)
    assert row[f'{split} runs'] == '3'
  assert int(row['free']) == 60
  assert float(row['share (%)']) == pytest.approx(1.0)
  markdown = (output / 'tables' / 'settings_sort.md').read_text()
  assert '53.00 ± 2.65 (3)' in markdown


def test_all_figures_are_files_and_on_the_page(written):
  _, output = written
  names = {path.stem for path in (output / 'figures').iterdir()}
  assert names == {
    'figure_1_sort',
    'figure_4_sort_modules',
    'figure_5_sort',
    'figure_6_sort',
    'figure_7_sort',
    'figure_8_runs',
  }
  page = (output / 'report.html').read_text()
  for name in names:
    png = (output / 'figures' / f'{name}.png').read_bytes()
    assert png.startswith(b'\x89PNG')
    svg = (output / 'figures' / f'{name}.svg').read_text()
    assert svg.startswith('<?xml')
    assert f'id="{name}"' in page


class _References(html.parser.HTMLParser):
  def __init__(self):
    super().__init__()
    self.found = []
    self.tags = set()

  def handle_starttag(self, tag, attrs):
    self.tags.add(tag)
    names = ('src', 'href', 'srcset', 'data', 'action', 'poster')
    self.found += [value for name, value in attrs if name in names]


def test_the_page_refers_to_nothing_outside(written):
  page = (written[1] / 'report.html').read_text()
  parser = _References()
  parser.feed(page)
  assert len(parser.found) > 10
  for reference in parser.found:
    assert reference.startswith(('data:image/png;base64,', '#')), reference
  assert not parser.tags & {'script', 'link', 'iframe', 'object'}
  style = page[: page.index('</style>')]
  assert 'url(' not in style
  assert '@import' not in style


def test_twice_gives_the_same_bytes(written, tmp_path):
  root, output = written
  report.make([root], tmp_path)
  first = {
    p.relative_to(output): p.read_bytes()
    for p in output.rglob('*')
    if p.is_file()
  }
  second = {
    p.relative_to(tmp_path): p.read_bytes()
    for p in tmp_path.rglob('*')
    if p.is_file()
  }
  assert first == second


def test_a_copied_run_alone_can_be_read(written, tmp_path):
  root, _ = written
  copied = shutil.copytree(root / 'dst_0.5_1', tmp_path / 'copied')
  made = report.make([copied], tmp_path / 'out')
  assert not made.problems
  (row,) = _rows(tmp_path / 'out', 'settings_sort')
  assert float(row['test']) == _TEST[0.5][1]


@settings(deadline=None, max_examples=25)
@given(
  st.lists(
    st.tuples(st.integers(0, 400), st.integers(0, 50)), min_size=2, max_size=4
  )
)
def test_overlaps_are_those_of_sets(sizes):
  subsets = [analysis_runs.random_subset(n, seed) for n, seed in sizes]
  sets = [
    {(path, i) for path, p in s.positions.items() for i in p.tolist()}
    for s in subsets
  ]
  found = overlap_figures.matrix(subsets)
  for i, j in itertools.product(range(len(sets)), repeat=2):
    a, b = sets[i], sets[j]
    assert found[i][j].shared == len(a & b)
    if a:
      assert found[i][j].share == len(a & b) / len(a)
      assert found[i][j].jaccard == len(a & b) / len(a | b)
    if i == j and a:
      assert found[i][j].share == 1


def test_overlaps_of_checkpoints_and_runs_are_counted_anew(written):
  _, output = written
  subsets = {
    (seed, i): {
      (path, k)
      for path, p in analysis_runs.random_subset(
        60, 10 * seed + i
      ).positions.items()
      for k in p.tolist()
    }
    for seed in range(3)
    for i in (1, 2)
  }
  (row,) = _rows(output, 'overlap_checkpoints_sort')
  a, b = subsets[0, 1], subsets[0, 2]
  assert (row['step'], row['later step']) == ('10', '20')
  assert float(row['Eq. 9 (%)']) == pytest.approx(100 * len(a & b) / 60)
  rows = _rows(output, 'overlap_runs')
  assert len(rows) == 3
  for row in rows:
    a, b = (subsets[int(row[name][-1]), 2] for name in ('run', 'other run'))
    assert int(row['shared']) == len(a & b)
    jaccard = 100 * len(a & b) / len(a | b)
    assert float(row['Jaccard (%)']) == pytest.approx(jaccard)


def test_modules_share_what_is_free(written):
  _, output = written
  rows = _rows(output, 'modules_sort')
  assert sum(float(r['of all free (%)']) for r in rows) == pytest.approx(100)
  assert sum(float(r['of the model (%)']) for r in rows) == pytest.approx(100)
  (row,) = [r for r in rows if r['module'] == 'embeddings']
  free = [
    len(
      analysis_runs.random_subset(60, 10 * seed + 2).positions.get(
        'token_embedder/embedding', ()
      )
    )
    for seed in range(3)
  ]
  expected = 100 * np.mean(free) / 60
  assert float(row['of all free (%)']) == pytest.approx(expected)
  assert row['of all free (%) runs'] == '3'


def _write_sweep(root, rows):
  """Writes `runs.json` of settings and states."""
  (root / 'runs.json').write_text(
    json.dumps(
      [
        {'name': name, 'settings': settings, 'state': state}
        for name, (settings, state) in rows.items()
      ]
    )
  )


_SWEEP = {'model': 'small', 'task': 'sort', 'method': 'dst', 'EPSILON': '1e-2'}


def test_missing_and_failed_runs_are_shown(tmp_path):
  root = tmp_path / 'sweep'
  rows = {}
  for rate, seed in itertools.product((0.1, 0.5), (0, 1)):
    name = f'dst_{rate}_{seed}'
    rows[name] = (
      _SWEEP | {'LEARNING_RATE': f'{rate}', 'RANDOM_SEED': f'{seed}'},
      'finished',
    )
    if (rate, seed) != (0.5, 1):
      score = 60.0 + 100 * rate
      analysis_runs.write(
        root / name, score, learning_rate=rate, random_seed=seed, epsilon=0.01
      )
  # The better learning rate failed with the other random seed.
  rows['dst_0.5_1'] = rows['dst_0.5_1'][0], 'failed'
  for silos in ('none', 'per_module'):
    more = {'SILOS': f"'{silos}'", 'LEARNING_RATE': '0.1'}
    rows[f'dst_{silos}'] = _SWEEP | more, 'waiting'
  _write_sweep(root, rows)
  made = report.make([root], tmp_path / 'out')
  assert not made.problems
  found = {
    row['variant']: row for row in _rows(tmp_path / 'out', 'settings_sort')
  }
  main = found['inverse_relative, silos per_module_and_layer']
  assert main['model'] == 'small'
  assert main['learning rate'] == '0.1'
  assert main['dev'] == '70.0'
  assert main['runs missing'] == '1'
  assert found['inverse_relative, silos none']['runs missing'] == '1'
  table = _rows(tmp_path / 'out', 'table_2_small_sort')
  by_row = {(row['silos'], row['distance']): row for row in table}
  assert by_row['none', 'inverse-relative']['ε = 0.01'] == 'missing'
  assert by_row['none', 'relative']['ε = 0.01'] == ''
  assert by_row['module and layer', 'inverse-relative']['ε = 0.01'] == '70.0'
  assert by_row['none', 'relative']['paper, ε = 1e-6'] == '72.45'
  assert '3 of 6 runs' in (tmp_path / 'out' / 'report.html').read_text()
  states = {row['run']: row['state'] for row in _rows(tmp_path / 'out', 'runs')}
  assert states['dst_0.5_1'] == 'failed'
  assert states['dst_none'] == 'missing'
  header = (tmp_path / 'out' / 'header.txt').read_text()
  assert 'silos none: missing' in header.replace('\n#     ', ' ')


def test_a_sweep_s_file_tells_what_is_missing(tmp_path, capsys):
  (tmp_path / 'sweep.yaml').write_text(
    'model: small\ntask: sort\nmethod: dst\nEPSILON: [1e-2, 1e-1]\n'
  )
  root = tmp_path / 'runs'
  analysis_runs.write(root / 'small_sort_dst_epsilon=1e-2', 50.0, epsilon=0.01)
  output = tmp_path / 'out'
  sweep = f'--sweep={tmp_path / "sweep.yaml"}'
  assert report.main([str(root), f'--output={output}', sweep]) == 0
  assert '2 runs: 1 finished, 1 missing' in capsys.readouterr().out
  missing = {
    row['budget']: row['runs missing'] for row in _rows(output, 'settings_sort')
  }
  assert missing == {'ε = 0.01': '0', 'ε = 0.1': '1'}
  assert 'there is no sweep' in _error(capsys, root, '--sweep=nothing.yaml')


def test_trials_are_compared_over_the_seeds_that_all_have(tmp_path):
  # The search was on random seed 0, three more runs at the best rate.
  scores = {0.1: (61.0,), 0.5: (62.0, 30.0, 31.0, 32.0)}
  for rate, of_seeds in scores.items():
    for seed, score in enumerate(of_seeds):
      analysis_runs.write(
        tmp_path / f'{rate}_{seed}',
        score,
        learning_rate=rate,
        random_seed=seed,
        epsilon=0.01,
      )
  runs = folders.read([tmp_path], pytest.fail)
  (cell,) = cells.make(runs, 'sort/exact_match')
  assert cell.learning_rate == 0.5
  assert cell.score('sort/exact_match', 'validation').values == scores[0.5]


def test_every_table_of_the_paper_has_our_numbers_beside_its_own(tmp_path):
  silos = ('none', 'per_module', 'per_module_and_layer')
  score = itertools.count(50)
  expected = {}
  for distance, where, churn in itertools.product(
    ('relative', 'inverse_relative'), silos, (True, False)
  ):
    expected[distance, where, churn] = float(next(score))
    analysis_runs.write(
      tmp_path / f'{distance}_{where}_{churn}',
      expected[distance, where, churn],
      epsilon=1e-3,
      distance=distance,
      silos=where,
      churn=churn,
    )
  for kind, over in itertools.product(('size', 'mean'), silos[1:]):
    expected[kind, over] = float(next(score))
    analysis_runs.write(
      tmp_path / f'{kind}_{over}',
      expected[kind, over],
      epsilon=1e-3,
      silos='none',
      normalization=kind,
      normalize_over=over,
    )
  analysis_runs.write(tmp_path / 'lora', 33.0, method='lora', rank=1, free=120)
  output = tmp_path / 'out'
  report.make([tmp_path], output)
  where = '0.006M_sort'
  table = _rows(output, f'table_2_{where}')
  row = table[4]
  assert (row['silos'], row['distance']) == ('module', 'relative')
  assert float(row['ε = 0.001']) == expected['relative', 'per_module', True]
  assert row['paper, ε = 1e-6'] == '72.11'
  assert row['paper, larger ε'] == '74.08'
  row = _rows(output, f'table_3_{where}')[3]
  assert (row['method'], row['per']) == (
    'mean normalization',
    'module and layer',
  )
  assert float(row['ε = 0.001']) == expected['mean', 'per_module_and_layer']
  assert row['paper, ε = 1e-6'] == '70.8'
  row = _rows(output, f'table_7_{where}')[0]
  assert float(row['no churn']) == expected['inverse_relative', 'none', False]
  assert float(row['with churn']) == expected['inverse_relative', 'none', True]
  rows = _rows(output, f'table_6_{where}')
  (row,) = [r for r in rows if r['setting'] == 'rank = 1']
  assert float(row['sort/exact_match']) == 33.0
  assert row['paper, BLEURT'] == '73.68'


def test_damaged_files_are_named_and_the_rest_is_reported(tmp_path, capsys):
  root = _write_all(tmp_path / 'all')
  (root / 'dst_0.1_0' / 'run.json').write_text('{"config"')
  (root / 'dst_0.5_0' / 'last.dst').write_bytes(b'nothing')
  (root / 'dst_0.5_1' / 'best.json').write_text('[')
  with (root / 'dst_0.5_2' / 'metrics.jsonl').open('a') as file:
    file.write('{"step": 3')
  (root / 'runs.json').write_text('{')
  assert report.main([str(root), f'--output={tmp_path / "out"}']) == 0
  captured = capsys.readouterr()
  for name in (
    'dst_0.1_0/run.json is damaged',
    'dst_0.5_0/last.dst: it is no subset file',
    'dst_0.5_1/best.json is damaged',
    'all/runs.json is damaged',
  ):
    assert name in captured.err
  assert '8 runs: 1 damaged, 7 finished' in captured.out
  page = (tmp_path / 'out' / 'report.html').read_text()
  assert 'dst_0.1_0/run.json is damaged' in page
  assert '53.00 ± 2.65 (3)' in page


_STRANGE = ('', '[]', '3', '{}', '{"config": 5}', '{"step": []}', '"x"')


@pytest.mark.parametrize(
  'name', ['run.json', 'report.json', 'best.json', 'metrics.jsonl']
)
def test_whatever_a_file_holds_others_are_read(name, tmp_path):
  for text in _STRANGE:
    root = tmp_path / f'{len(list(tmp_path.iterdir()))}'
    analysis_runs.write(root / 'good', 50.0, epsilon=0.01)
    bad = analysis_runs.write(root / 'bad', 60.0, epsilon=0.1)
    (bad / name).write_text(text)
    told = []
    found = {run.name: run for run in folders.read([root], told.append)}
    assert found['good'].state == 'finished'
    assert all(str(bad) in line and '\n' not in line for line in told)
    assert told or found['bad'].state in ('finished', 'not finished')


def test_a_run_of_a_newer_version_is_named(tmp_path):
  analysis_runs.write(tmp_path / 'old', 50.0, epsilon=0.01)
  newer = analysis_runs.write(tmp_path / 'new', 60.0, epsilon=0.1)
  said = json.loads((newer / 'run.json').read_text())
  (newer / 'run.json').write_text(json.dumps(said | {'format': 99}))
  told = []
  found = {run.name: run for run in folders.read([tmp_path], told.append)}
  assert (found['old'].state, found['new'].state) == ('finished', 'damaged')
  (line,) = told
  assert f'{newer / "run.json"} has format 99: a newer dst_t5x' in line


def test_runs_of_different_seeds_are_apart(tmp_path):
  for i, fingerprint in enumerate(('ab' * 32, 'cd' * 32)):
    analysis_runs.write(
      tmp_path / f'run_{i}',
      50.0 + i,
      epsilon=0.01,
      fingerprint=fingerprint,
      random_seed=i,
    )
  made = report.make([tmp_path], tmp_path / 'out')
  (problem,) = made.problems
  assert 'have 2 different seeds (abababab…, cdcdcdcd…)' in problem
  rows = _rows(tmp_path / 'out', 'settings_sort')
  assert [row['dev'] for row in rows] == ['50.0', '51.0']


def test_zero_shot_is_that_of_the_seed(tmp_path):
  analysis_runs.write(tmp_path / 'run', 50.0, epsilon=0.01)
  analysis_runs.write_zero_shot(tmp_path / 'zero', 12.0)
  analysis_runs.write_zero_shot(tmp_path / 'zero_test', 13.0, split='test')
  report.make([tmp_path], tmp_path / 'out')
  (row,) = [
    row
    for row in _rows(tmp_path / 'out', 'settings_sort')
    if row['method'] == 'zero_shot'
  ]
  assert (row['model'], row['dev'], row['test']) == ('0.006M', '12.0', '13.0')


def test_several_tasks_have_a_figure_each(tmp_path):
  for task, size in itertools.product(('sort', 'copy'), (6000, 60000)):
    for epsilon in (0.01, 0.1):
      analysis_runs.write(
        tmp_path / f'{task}_{size}_{epsilon}',
        50.0,
        task=task,
        epsilon=epsilon,
        parameters=size,
      )
  made = report.make([tmp_path], tmp_path / 'out')
  names = [figure.name for figure in made.figures]
  for task in ('sort', 'copy'):
    assert {f'figure_2_{task}', f'figure_6_{task}'} <= set(names)
    rows = _rows(tmp_path / 'out', f'settings_{task}')
    assert [row['model'] for row in rows] == ['0.006M'] * 2 + ['0.06M'] * 2


def test_what_is_no_run_is_said_in_one_line(tmp_path, capsys):
  (tmp_path / 'sweeps').mkdir()
  assert "did you mean 'sweeps'?" in _error(capsys, tmp_path / 'sweps')
  assert 'is neither a run nor a sweep' in _error(capsys, tmp_path / 'sweeps')
  (tmp_path / 'file').write_text('')
  assert 'is a file' in _error(capsys, tmp_path / 'file')
  analysis_runs.write(tmp_path / 'run', 50.0, epsilon=0.01)
  message = _error(capsys, tmp_path / 'run', '--metric=exact_mach')
  assert "did you mean 'sort/exact_match'?" in message
  message = _error(
    capsys, tmp_path / 'run', f'--output={tmp_path / "file" / "out"}'
  )
  assert 'cannot write to the folder' in message


def _sampled(sweep):
  """Returns a run of each method and set of keys of a sweep that we ship."""
  found = {}
  for run in grid.read(f'launch/sweeps/{sweep}.yaml'):
    told = {k: run.settings.get(k) for k in ('SILOS', 'DISTANCE', 'CHURN')}
    key = (run.settings['method'], run.settings['task'], *told.values())
    found.setdefault(key, run)
  return list(found.values())


@pytest.mark.parametrize('sweep', ['figure_1', 'table_2', 'table_3', 'table_7'])
def test_a_sweep_says_of_a_run_what_the_run_will_say(sweep, monkeypatch):
  for run in _sampled(sweep):
    binaries.parse(run.flags('/nowhere'), training.train)
    told = setups.from_run(identity.of(training.train).settings, model='base')
    expected = planned.trial(run.settings)
    assert told.setup == expected.setup
    assert told.learning_rate == expected.learning_rate
    assert told.random_seed == expected.random_seed


def test_a_header_says_what_was_measured(written):
  _, output = written
  lines = (output / 'header.txt').read_text().splitlines()
  assert all(line.startswith('# ') and len(line) <= 80 for line in lines)
  text = ' '.join(line.removeprefix('#').strip() for line in lines)
  assert 'sort/exact_match, split test' in text
  assert '53.00 ± 2.65 (3), learning rate 0.5' in text
  assert 'full fine-tuning: 82.00 ± 2.83 (2)' in text
  assert '8 of 8 runs; hardware unknown, time unknown' in text


def test_no_training_code_is_imported():
  heavy = {'flax', 'gin', 'optax', 'orbax', 'seqio', 'tensorflow'}
  code = (
    'import sys; from dst_t5x.analysis import report, watch; '
    f'print(sorted({heavy} & sys.modules.keys()))'
  )
  done = subprocess.run(
    [sys.executable, '-c', code],
    env=os.environ | {'PYTHONPATH': str(commands.TESTS.parent)},
    capture_output=True,
    text=True,
    timeout=commands.TIMEOUT,
  )
  assert done.stdout == '[]\n', done.stderr


# What the demonstration writes, and other programs.
@pytest.mark.parametrize('content', ['[{"name": "full"}]', '{"bleu": 3}', '3'])
def test_results_of_others_do_not_hide_the_runs_of_a_folder(
  tmp_path, capsys, content
):
  root = _write_all(tmp_path / 'all')
  assert report.main([str(root), f'--output={tmp_path / "a"}']) == 0
  expected = capsys.readouterr().out.splitlines()[0]
  (root / 'results.json').write_text(content)
  assert report.main([str(root), f'--output={tmp_path / "b"}']) == 0
  captured = capsys.readouterr()
  assert captured.out.splitlines()[0] == expected
  assert 'results.json' not in captured.err
  (tmp_path / 'alone').mkdir()
  (tmp_path / 'alone' / 'results.json').write_text(content)
  assert 'neither a run nor a sweep' in _error(capsys, tmp_path / 'alone')


def test_an_evaluation_does_not_hide_the_runs_of_its_folder(tmp_path, capsys):
  root = _write_all(tmp_path / 'all')
  assert report.main([str(root), f'--output={tmp_path / "a"}']) == 0
  number = int(capsys.readouterr().out.split()[0])
  evaluation = analysis_runs.write_zero_shot(tmp_path / 'seed', score=1.0)
  shutil.copy(evaluation / 'results.json', root)
  assert report.main([str(root), f'--output={tmp_path / "b"}']) == 0
  assert capsys.readouterr().out.startswith(f'{number + 1} runs: ')
