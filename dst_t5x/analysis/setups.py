"""What a run tries: its method, budget, learning rate and random seed.

Read from `run.json`, which has every setting that makes a run; see
`runs.identity`. Of a run that has left nothing yet: see `planned`.
"""

from collections.abc import Mapping
import dataclasses
import functools
from typing import Any

from dst_t5x.core import json_text
from dst_t5x.method import silos as silo_lib

ZERO_SHOT = 'zero_shot'
PRETRAINING = 'pretraining'
SUBSETS = ('dst', 'random')
EPSILON = 'ε'
# Method -> what sets its budget; of others `Setup.knob_name` says it.
_LOW_RANK = ('lora', 'dora', 'pissa', 'vera')
_KNOBS = {
  **dict.fromkeys(SUBSETS, EPSILON),
  **dict.fromkeys(_LOW_RANK, 'rank'),
  'prompt': 'length',
}
# Settings that only choose the run among equals.
_RANDOM_SEEDS = ('random_seed', 'method.random_seed')
_LEARNING_RATE = 'optimizer.learning_rate.base'
# What else `run.json` says, besides settings.
_NO_SETTINGS = ('format', 'rows', 'seed', 'version')


@dataclasses.dataclass(frozen=True, order=True)
class Setup:
  """One method with one setting, whatever its learning rate and random seed.

  Attributes:
    model: what the model is called.
    task: what is trained on.
    method: its name in `run.json`, `zero_shot` or `pretraining`.
    knob: what sets the budget: ε, the rank, the length; 0 where nothing does.
    distance: of subsets, else ''.
    silos: of subsets, else ''; rules of one's own are called `rules`.
    normalization: `size`, `mean` or ''.
    normalize_over: a siloing, '' without normalization.
    churn: whether the subset is chosen anew in each step.
    more: what else makes it another method: exclusions, LoRA's targets, the
      other settings of a method that the analysis does not know.
    knob_name: what the knob of such a method is, `ε` or `rank`.
  """

  model: str
  task: str
  method: str
  knob: float = 0.0
  distance: str = ''
  silos: str = ''
  normalization: str = ''
  normalize_over: str = ''
  churn: bool = True
  more: str = ''
  knob_name: str = ''

  @property
  def is_default(self) -> bool:
    """Whether it is the method as the paper's main experiments have it."""
    usual = 'random' if self.method == 'random' else 'inverse_relative'
    return self.method not in SUBSETS or (
      (self.distance, self.silos) == (usual, 'per_module_and_layer')
      and self.churn
      and not self.normalization
      and not self.more
    )

  @property
  def variant(self) -> str:
    """What distinguishes it from others of the same method and budget."""
    parts = [f'silos {self.silos}' if self.silos else '', self.more]
    if self.method in SUBSETS:
      parts = [
        self.distance if self.method == 'dst' else '',
        f'silos {self.silos}',
        '' if self.churn else 'no churn',
        self.normalization
        and f'divided by {self.normalization} {self.normalize_over}',
        self.more,
      ]
    return ', '.join(part for part in parts if part)

  @property
  def budget(self) -> str:
    """What sets the budget, as text: `ε = 0.0001`."""
    name = self._knob_name
    return f'{name} = {self.knob:g}' if name else ''

  @property
  def epsilon(self) -> float | None:
    """ε, the share of parameters that are free; None if it is not set so."""
    return self.knob if self._knob_name == EPSILON else None

  @property
  def _knob_name(self) -> str:
    return self.knob_name or _KNOBS.get(self.method, '')


@dataclasses.dataclass(frozen=True)
class Trial:
  """A setup with what is tuned, and what only differs by chance.

  Attributes:
    setup: the method and its setting.
    learning_rate: None where nothing is trained, or nobody said.
    random_seed: of data order, dropout, and random subsets.
    rest: all other settings of the run, sorted; unknown (None) if the run has
      left nothing.
  """

  setup: Setup
  learning_rate: float | None
  random_seed: int
  rest: tuple[tuple[str, str], ...] | None = None


def from_run(record: Mapping[str, Any], model: str) -> Trial:
  """Returns what a run's `run.json` says.

  Args:
    record: its content.
    model: what the model is called.
  """
  settings = {k: v for k, v in record.items() if k not in _NO_SETTINGS}
  flat = dict(json_text.flat(settings))
  apart = (*_RANDOM_SEEDS, _LEARNING_RATE)
  rest = {k: json_text.dumps(v) for k, v in flat.items() if k not in apart}
  setup = Setup(model, str(record['task']), PRETRAINING)
  if not record.get('from_scratch'):
    setup = with_method(setup, record['method'])
  return Trial(
    setup,
    rate_of(flat.get(_LEARNING_RATE)),
    int(flat.get(_RANDOM_SEEDS[0]) or 0),
    tuple(sorted(rest.items())),
  )


def rate_of(value: Any) -> float | None:
  """Returns a learning rate, if that is what a value is."""
  return float(value) if isinstance(value, int | float) else None


def with_method(setup: Setup, method: Mapping[str, Any]) -> Setup:
  """Returns a setup with another method.

  Args:
    setup: its model and task stay.
    method: what `run.json` says of the method; see `runs.methods`.
  """
  settings = {k: v for k, v in method.items() if k != 'method'}
  name = str(method['method'])
  describe = _DESCRIBED.get(name, _of_any)
  return Setup(setup.model, setup.task, name, **describe(settings))


def _of_subset(get: Mapping[str, Any]) -> dict[str, Any]:
  normalization = get['normalization'] or ''
  more = [
    f'without {", ".join(get["exclude"])}' if get['exclude'] else '',
    f'{get["threshold"]} threshold' if get['threshold'] != 'exact' else '',
    '' if get['keep_seed'] else 'seed rebuilt',
  ]
  return {
    'knob': float(get['epsilon']),
    'distance': str(get['distance']),
    'silos': _siloing(get['silos']),
    'normalization': normalization,
    'normalize_over': _siloing(get['normalize_over']) if normalization else '',
    'churn': bool(get['churn']),
    'more': ', '.join(filter(None, more)),
  }


def _siloing(silos: Any) -> str:
  """Returns the name of silos; rules of one's own have none."""
  is_known = isinstance(silos, str) and silos in silo_lib.SILOS
  return silos if is_known else 'rules'


def _of_lora(get: Mapping[str, Any]) -> dict[str, Any]:
  targets = str(get['targets'])
  more = [
    '' if targets == _usual_targets() else f'targets {targets}',
    'rank-stabilized' if get.get('rank_stabilized') else '',
  ]
  return {'knob': float(get['rank']), 'more': ', '.join(filter(None, more))}


def _of_any(get: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the settings of a method that is not known here.

  A number `epsilon` or `rank` sets its budget. Empty settings are left out.
  """
  rest = {
    k: v
    for k, v in get.items()
    if k != 'random_seed' and v not in (None, '', [], {})
  }
  described: dict[str, Any] = {}
  for setting, name in (('epsilon', EPSILON), ('rank', 'rank')):
    if isinstance(rest.get(setting), int | float):
      described = {'knob': float(rest.pop(setting)), 'knob_name': name}
      break
  if 'silos' in rest:
    described['silos'] = _siloing(rest.pop('silos'))
  if rest.get('targets') == _usual_targets():
    del rest['targets']
  said = (f'{name} {json_text.dumps(v)}' for name, v in sorted(rest.items()))
  return {**described, 'more': ', '.join(said)}


def _nothing(get: Mapping[str, Any]) -> dict[str, Any]:
  del get
  return {}


@functools.cache
def _usual_targets() -> str:
  from dst_t5x.config import gin_files  # Gin, which few need.

  return str(gin_files.literals('gin/methods/lora.gin')['LORA_TARGETS'])


_DESCRIBED = {
  **dict.fromkeys(SUBSETS, _of_subset),
  **dict.fromkeys(('full', 'head_only', 'ia3', 'norms'), _nothing),
  **dict.fromkeys(_LOW_RANK, _of_lora),
  'prompt': lambda get: {'knob': float(get['length'])},
}
