"""The numbers of the studies' pages are those of their raw results."""

import collections
import importlib
import json
import pathlib
import re
import statistics

import pytest

from dst_t5x.launch import grid

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_STUDIES = _ROOT / 'studies'
_SWEEPS = _ROOT / 'launch' / 'sweeps' / 'study'
_OF_THREE_DIGITS = 'eval/loss', 'held_out/forgetting'
_SHOWN = re.compile(r'(-?\d+\.\d+) ± (\d+\.\d+) \((\d+)\)')

pytestmark = [
  pytest.mark.skipif(
    not _STUDIES.is_dir(), reason='studies/ are in the repository alone'
  ),
  # The folder, and the name of its module and of its page.
  pytest.mark.parametrize(
    ('folder', 'name'), [('strings', 'study'), ('family', 'family')]
  ),
]


def _runs(folder):
  lines = (_STUDIES / folder / 'runs.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines]


def test_the_page_is_what_the_raw_results_give(monkeypatch, folder, name):
  monkeypatch.syspath_prepend(_STUDIES / folder)
  study = importlib.import_module(name)
  assert study.PAGE.read_text() == study.page()


def test_no_result_is_written_by_hand(folder, name):
  text = (_STUDIES / folder / f'{name}.md.in').read_text()
  assert not re.findall(r'\d\.\d', text.replace('T5 1.1', ''))


def test_every_mean_is_one_of_the_test_runs(folder, name):
  """Computed anew, from nothing but the lines of the file."""
  cells = collections.defaultdict(list)
  for run in _runs(folder):
    settings = run['settings']
    if run['state'] == 'finished' and settings.get('EVAL_SPLIT') == 'test':
      rest = {k: v for k, v in settings.items() if k != 'RANDOM_SEED'}
      cells[json.dumps(rest, sort_keys=True)].append(run['scores'])
  known = set()
  for scores in cells.values():
    for metric in scores[0]:
      found = [of_run[metric] for of_run in scores]
      if len(found) > 1:
        digits = 3 if metric in _OF_THREE_DIGITS else 1
        known.add(
          (
            f'{statistics.fmean(found):.{digits}f}',
            f'{statistics.stdev(found):.{digits}f}',
            str(len(found)),
          )
        )
  shown = set(_SHOWN.findall((_ROOT / 'docs' / f'{name}.md').read_text()))
  assert shown
  assert shown <= known


def test_rates_were_chosen_on_other_data_and_random_seeds(folder, name):
  del name
  chosen = collections.defaultdict(set)
  for run in _runs(folder):
    settings = run['settings']
    is_test = settings.get('EVAL_SPLIT') == 'test'
    assert is_test == (settings['RANDOM_SEED'] != '0')
    if is_test:
      rest = {
        k: v
        for k, v in settings.items()
        if k not in ('RANDOM_SEED', 'LEARNING_RATE')
      }
      chosen[json.dumps(rest)].add(settings['LEARNING_RATE'])
  assert all(len(rates) == 1 for rates in chosen.values())


def test_runs_are_those_of_the_sweeps(folder, name):
  del name
  planned = {
    (path.stem, run.name): dict(run.settings)
    for path in _SWEEPS.glob('*.yaml')
    for run in grid.read(str(path))
  }
  for run in _runs(folder):
    assert planned[run['sweep'], run['name']] == run['settings']
