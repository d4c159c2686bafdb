"""What a run tries: its method, budget, learning rate and random seed.

Told from `run.json`, which has every value that makes a run; or, where a run of
a sweep has left nothing yet, from the macros of the sweep.
"""

import ast
from collections.abc import Mapping
import dataclasses
import pathlib
from typing import Any

from dst_t5x.method import silos as silo_lib

ZERO_SHOT = 'zero_shot'
PRETRAINING = 'pretraining'
SUBSETS = ('dst', 'random')
_ADAPTERS = {'LoRA': 'lora', 'Prompt': 'prompt', 'IA3': 'ia3'}
# Bindings that only choose the run among equals.
_RANDOM_SEEDS = ('train.random_seed', 'SubsetProjection.random_seed')
_LEARNING_RATE = 'schedule.base'


@dataclasses.dataclass(frozen=True, order=True)
class Setup:
  """One method with one setting, whatever its learning rate and random seed.

  Attributes:
    model: what the model is called.
    task: what is trained on.
    method: `dst`, `random`, `lora`, `prompt`, `ia3`, `norms`, `head_only`,
      `full`, `zero_shot`, `pretraining`, or the name of an adapter's class.
    knob: what sets the budget: ε, the rank, the length; 0 where nothing does.
    distance: of subsets, else ''.
    silos: likewise; rules of one's own are called `rules`.
    normalization: `size`, `mean` or ''.
    normalize_over: a siloing, '' without normalization.
    churn: whether the subset is chosen anew in each step.
    more: what else makes it another method: exclusions, LoRA's targets.
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
    parts = [self.more]
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
    names = {'lora': 'rank', 'prompt': 'length'}
    name = 'ε' if self.method in SUBSETS else names.get(self.method, '')
    return f'{name} = {self.knob:g}' if name else ''


@dataclasses.dataclass(frozen=True)
class Trial:
  """A setup with what is tuned, and what only differs by chance.

  Attributes:
    setup: see there.
    learning_rate: None where nothing is trained, or nobody said.
    random_seed: of data order, dropout, and random subsets.
    rest: all other bindings of the run, sorted; unknown (None) if the run has
      left nothing.
  """

  setup: Setup
  learning_rate: float | None
  random_seed: int
  rest: tuple[tuple[str, str], ...] | None = None


def from_run(config: Mapping[str, str], model: str) -> Trial:
  """Returns what a run's `run.json` says.

  Args:
    config: parameter -> value, as gin writes it.
    model: what the model is called.
  """
  known = {
    '.'.join(name.split('.')[-2:]): value for name, value in config.items()
  }
  value = {name: _literal(text) for name, text in known.items()}
  setup = Setup(
    model,
    str(value.get('TrainData.task', '')),
    _method(value),
    **_of_method(value),
  )
  told = (*_RANDOM_SEEDS, _LEARNING_RATE)
  rest = {name: text for name, text in known.items() if name not in told}
  rate = value.get(_LEARNING_RATE)
  return Trial(
    setup,
    float(rate) if isinstance(rate, int | float) else None,
    int(value.get(_RANDOM_SEEDS[0]) or 0),
    tuple(sorted(rest.items())),
  )


def _literal(text: str) -> Any:
  """Returns the value that gin's text stands for; references stay text."""
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError):
    return text


def _method(value: Mapping[str, Any]) -> str:
  """Returns the method that bindings describe."""
  if value.get('train.from_scratch'):
    return PRETRAINING
  projection = str(value.get('Trainer.projection', ''))
  if projection.endswith('SubsetProjection()'):
    is_random = value.get('SubsetProjection.distance') == 'random'
    return 'random' if is_random else 'dst'
  adapter = value.get('with_adapter.adapter')
  if isinstance(adapter, str):
    name = adapter.removesuffix('()').rpartition('.')[2]
    return _ADAPTERS.get(name, name)
  if trained := value.get('Trainer.trained'):
    return {
      ('.*norm/scale',): 'norms',
      ('decoder/logits_dense/kernel',): 'head_only',
    }.get(tuple(trained), 'partial')
  return 'full'


def _of_method(value: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the arguments of `Setup` that go with the method."""
  method = _method(value)
  if method == 'lora':
    targets = str(value.get('LoRA.targets', ''))
    rank = float(value.get('LoRA.rank', 0))
    return {'knob': rank, 'more': _targets(targets)}
  if method == 'prompt':
    return {'knob': float(value.get('Prompt.length', 0))}
  if method not in SUBSETS:
    return {}
  get = {
    name.removeprefix('SubsetProjection.'): of
    for name, of in value.items()
    if name.startswith('SubsetProjection.')
  }
  return _of_subset(get)


def _of_subset(get: Mapping[str, Any]) -> dict[str, Any]:
  normalization = get.get('normalization') or ''
  threshold = get.get('threshold', 'exact')
  more = [
    f'without {", ".join(get["exclude"])}' if get.get('exclude') else '',
    f'{threshold} threshold' if threshold != 'exact' else '',
    '' if get.get('keep_seed', True) else 'seed rebuilt',
  ]
  return {
    'knob': float(get['epsilon']),
    'distance': str(get.get('distance', 'inverse_relative')),
    'silos': _siloing(get.get('silos', 'per_module_and_layer')),
    'normalization': normalization,
    'normalize_over': _siloing(
      get.get('normalize_over', 'per_module_and_layer')
    )
    if normalization
    else '',
    'churn': bool(get.get('churn', True)),
    'more': ', '.join(filter(None, more)),
  }


def _siloing(silos: Any) -> str:
  """Returns the name of silos; rules of one's own have none."""
  is_known = isinstance(silos, str) and silos in silo_lib.SILOS
  return silos if is_known else 'rules'


def _targets(expression: str) -> str:
  """Returns LoRA's targets where they are not the default."""
  usual = '.*attention/(query|value)'
  return '' if expression in ('', usual) else f'targets {expression}'


def from_sweep(macros: Mapping[str, str]) -> Trial:
  """Returns what a sweep says of a run that has left nothing.

  Args:
    macros: key of the sweep's file -> value, as gin reads it.
  """
  value = {name: _literal(text) for name, text in macros.items()}
  method = _stem(macros.get('method', 'full'))
  if _stem(macros.get('run', '')) == 'pretrain':
    method = PRETRAINING
  task = value.get('MIXTURE_OR_TASK_NAME') or _stem(macros.get('task', ''))
  more: dict[str, Any] = {}
  if method in ('dst', 'dst_no_churn', 'random'):
    get: dict[str, Any] = {'epsilon': 1e-4, 'churn': method != 'dst_no_churn'}
    get |= {
      name.lower(): of for name, of in value.items() if name in _SUBSET_MACROS
    }
    if method == 'random':
      get['distance'] = 'random'
    method = 'random' if get.get('distance') == 'random' else 'dst'
    more = _of_subset(get)
  elif method == 'lora':
    targets = str(value.get('LORA_TARGETS', ''))
    knob = float(value.get('LORA_RANK', 8))
    more = {'knob': knob, 'more': _targets(targets)}
  elif method == 'prompt':
    more = {'knob': float(value.get('PROMPT_LENGTH', 10))}
  rate = value.get('LEARNING_RATE')
  return Trial(
    Setup(_stem(macros.get('model', '')), str(task), method, **more),
    float(rate) if isinstance(rate, int | float) else None,
    int(value.get('RANDOM_SEED') or 0),
  )


_SUBSET_MACROS = (
  'EPSILON',
  'DISTANCE',
  'SILOS',
  'EXCLUDE',
  'NORMALIZATION',
  'NORMALIZE_OVER',
  'CHURN',
  'THRESHOLD',
  'KEEP_SEED',
)


def _stem(value: str) -> str:
  return pathlib.PurePath(value).stem if value.endswith('.gin') else value
