"""Every sparse method as a user runs it: budgets, phases, resumption."""

import json

import commands
import numpy as np
import pytest

from dst_t5x import subsets
from dst_t5x.checkpoints import seeds
from dst_t5x.core import parts

_PARAMETERS = 39_328
_EPSILON = 0.01
_STEPS = 12
# Method -> its own macros. Phases begin within the run, and intervals do not
# divide its length.
METHODS = {
  'shira_random': {},
  'shira_magnitude': {},
  'super_tuning': {'SUPER_TUNING_END': 'smallest'},
  'pafi': {},
  'shira_snip': {'SCORE_STEPS': 4},
  'fish': {'SCORE_STEPS': 4},
  'child_tuning': {'SCORE_STEPS': 4},
  'lt_sft': {'FIRST_STEPS': 5},
  'prune_after': {'PRUNE_AFTER_STEPS': _STEPS},
  'id3': {'GROW_STEPS': 9},
  'gasdu': {'INTERVAL': 5},
  'nano_adam': {'INTERVAL': 5},
  'lift': {'INTERVAL': 5, 'LIFT_RANK': 2},
  'spiel': {'INTERVAL': 5, 'SPIEL_ACCUMULATE': 2, 'SPIEL_STEPS': _STEPS},
}
# Their budget is a share of all parameters; those of others, of some tensors.
_OF_ALL = ('pafi', 'fish', 'prune_after', 'id3')
_KEEP_LEAVERS = ('gasdu', 'nano_adam', 'lift')


def _train(seed, method, folder, steps, **more):
  commands.call(
    'train',
    *commands.finetune(seed, method),
    *commands.flags(
      MODEL_DIR=folder,
      TRAIN_STEPS=steps,
      EVAL_EXAMPLES=4,
      LOG_PERIOD=1,
      EPSILON=_EPSILON,
      LEARNING_RATE=0.1,
      **METHODS[method] | more,
    ),
  )


# One of each kind; the others are slow.
_FAST = ('shira_random', 'fish', 'lt_sft', 'spiel', 'gasdu')


@pytest.fixture(
  scope='module',
  params=[
    name if name in _FAST else pytest.param(name, marks=pytest.mark.slow)
    for name in METHODS
  ],
)
def run(request, toy_seed, tmp_path_factory):
  """The name and the folder of a method's run."""
  folder = tmp_path_factory.mktemp('sparse') / request.param
  _train(toy_seed, request.param, folder, _STEPS)
  return request.param, folder


def _rows(folder):
  lines = (folder / 'metrics.jsonl').read_text().splitlines()
  return [row for row in map(json.loads, lines) if 'free/total' in row]


def _free(folder, seed):
  """Returns how many parameters differ from the seed."""
  before = parts.flatten(seeds.load_seed(seed).params)
  after = parts.flatten(seeds.load_seed(folder).params)
  return sum(int(np.sum(after[path] != x)) for path, x in before.items())


def test_the_budget_is_exact_or_counted(run, toy_seed):
  method, folder = run
  report = json.loads((folder / 'report.json').read_text())
  free = _free(folder, toy_seed)
  assert free == report['free'] == _rows(folder)[-1]['free/total']
  assert free == subsets.load(folder / 'last.dst')[0].size > 0
  if method in _KEEP_LEAVERS:
    # The smallest weights are nearly the same ones at the next choice.
    assert method != 'gasdu' or report['budget'] < free
    assert free <= report['free_at_most']
    return
  # Some components never get a gradient.
  assert 0.5 * report['budget'] < free <= report['budget']
  if method in _OF_ALL:
    assert report['budget'] == round(_EPSILON * _PARAMETERS)


def test_a_run_is_resumed_to_the_bit_in_each_phase(run, toy_seed, tmp_path):
  method, folder = run
  # Within each phase, and where one begins; SpIEL's windows are at 5 and 10.
  has_phases = method in ('shira_snip', 'fish', 'child_tuning', 'lt_sft')
  for steps in (3, 5, _STEPS) if has_phases else (6, _STEPS):
    _train(toy_seed, method, tmp_path / 'in parts', steps)
  assert (tmp_path / 'in parts' / 'last.dst').read_bytes() == (
    folder / 'last.dst'
  ).read_bytes()


def test_phases_tune_what_they_should(run):
  method, folder = run
  free = [row['free/total'] for row in _rows(folder)]
  if method in ('shira_snip', 'fish', 'child_tuning'):
    assert free[:4] == [0] * 4 < free[4:5]
  if method == 'lt_sft':
    # From the end of the first phase on the parameters are the seed again.
    assert min(free[:4]) > 0.5 * _PARAMETERS
    assert free[4] == 0 < free[5]
  if method == 'spiel':
    # All are replaced in step 2, few later; the new ones move in the next step.
    assert free[1] < 0.5 * free[2]
    assert max(free) == free[-1]
  if method == 'prune_after':
    assert min(free[:-1]) > 0.5 * _PARAMETERS
  if method == 'id3':
    assert free[0] < free[4] < free[8] == free[-1]
  if method in _KEEP_LEAVERS:
    assert max(free[:5]) <= _EPSILON * _PARAMETERS + 1
    assert method != 'gasdu' or max(free[:5]) < free[5]
