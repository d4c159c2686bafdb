"""Numbers of the comparison of sparse methods, from its raw results.

    python studies/family/family.py

writes docs/family.md. `runs.jsonl` is what `python -m launch.records` says of
the sweeps, `family.md.in` the text, in which {names} stand for what is computed
here. No result is written by hand.
"""

from collections.abc import Iterable, Mapping
import dataclasses
import pathlib

import numpy as np

from dst_t5x.analysis import paper_tables
from dst_t5x.analysis import raw_results
from dst_t5x.analysis.raw_results import MISSING
from dst_t5x.analysis.raw_results import table

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent.parent
PAGE = ROOT / 'docs' / 'family.md'
TASK = 'study_finetune'
SCORE = f'{TASK}/character_accuracy'
LOSS = 'eval/loss'
FORGETTING = 'held_out/forgetting'
BUDGETS = SMALL, LARGE = '1e-3', '1e-2'
_SILOS = {
  'none': 'no silos',
  'per_tensor': 'silos per tensor',
  'per_module_and_layer': 'silos per module and layer',
}


@dataclasses.dataclass(frozen=True, order=True)
class Setting:
  """What a cell is about; as in the sweeps' files.

  Attributes:
    method: the name of the method's file.
    budget: EPSILON.
    silos: SILOS; '' for the default of the method's file.
    schedule: EPSILON_SCHEDULE.
    start: EPSILON_START; '' for a budget that is constant.
  """

  method: str
  budget: str
  silos: str = ''
  schedule: str = 'constant'
  start: str = ''

  def is_like(self, other: 'Setting') -> bool:
    """Returns whether another cell differs in its schedule at most."""
    return (
      dataclasses.replace(other, schedule=self.schedule, start=self.start)
      == self
    )


Study = raw_results.Results[Setting]


def setting_of(settings: Mapping[str, str]) -> Setting | None:
  """Returns what a run's settings say."""
  if settings['task'] != TASK:
    return None
  return Setting(
    settings['method'],
    settings['EPSILON'],
    settings.get('SILOS', '').strip('\'"'),
    settings.get('EPSILON_SCHEDULE', 'constant'),
    settings.get('EPSILON_START', ''),
  )


def dst(
  silos: str = 'none', schedule: str = 'constant', start: str = ''
) -> Setting:
  """Returns a cell of DST at the small budget."""
  return Setting('dst', SMALL, silos, schedule, start)


def load() -> Study:
  """Returns the study of the committed raw results."""
  lines = (HERE / 'runs.jsonl').read_text().splitlines()
  return Study(lines, setting_of, SCORE)


def name(cell: Setting) -> str:
  """Returns `DST, no silos`."""
  name = paper_tables.METHODS[cell.method]
  if cell.method == 'super_tuning':
    name += ' (smallest)'
  return ', '.join(filter(None, (name, _SILOS.get(cell.silos, cell.silos))))


def _by_score(study: Study, cells: Iterable[Setting]) -> list[Setting]:
  """Returns the cells that have results, the best first."""
  found = [cell for cell in cells if len(study.values(cell))]
  # Cells of equal means have the same order in every process.
  return sorted(
    found, key=lambda cell: (-float(np.mean(study.values(cell))), cell)
  )


def _constant(study: Study, budget: str) -> list[Setting]:
  return _by_score(
    study,
    [c for c in study.cells if c.budget == budget and c.schedule == 'constant'],
  )


def _share(study: Study, cell: Setting) -> str:
  """Returns the share of all parameters that differ in the end, in %."""
  runs = study.runs_of(cell)
  share = np.mean([run['free'] / run['parameters'] for run in runs])
  return f'{100 * share:.3g} %'


def winners(study: Study, budget: str) -> str:
  """All methods at a budget, the best first."""
  first, *rest = cells = _constant(study, budget)
  differences = [MISSING, *(study.difference(cell, first) for cell in rest)]
  rows = [
    (
      name(cell),
      _share(study, cell),
      study.mean(cell),
      off if cell != first else '',
      study.mean(cell, LOSS),
      study.mean(cell, FORGETTING),
    )
    for cell, off in zip(cells, differences, strict=True)
  ]
  return table(
    ('', 'differ', 'characters', 'less the first', 'loss', 'forgetting'), rows
  )


def schedule(cell: Setting) -> str:
  """Returns `cubic, from 0.01`."""
  if cell.schedule == 'constant':
    return 'constant'
  return f'{cell.schedule}, from {float(cell.start):g}'


def shrinking(study: Study) -> str:
  """Budgets that shrink to a thousandth, beside constant ones."""
  constant = [dst(), dst('per_module_and_layer'), Setting('spiel', SMALL)]
  rows = [
    (
      name(cell),
      schedule(cell),
      study.mean(cell),
      '' if cell == base else study.difference(cell, base),
      study.mean(cell, LOSS),
      study.mean(cell, FORGETTING),
    )
    for base in constant
    for cell in _by_score(study, filter(base.is_like, study.cells))
  ]
  return table(
    ('', 'ε', 'characters', 'less constant', 'loss', 'forgetting'), rows
  )


def rates(study: Study) -> str:
  """All learning rates."""
  rows = [
    (f'{name(cell)}, {cell.budget}, {schedule(cell)}', *study.rates(cell))
    for cell in sorted(study.cells)
  ]
  return table(('', 'best', 'all: characters, development set'), rows)


def _counts(study: Study) -> dict[str, str]:
  final = [
    run
    for run in study.runs
    if run['state'] == 'finished'
    and run['settings'].get('EVAL_SPLIT') == 'test'
  ]
  return {
    'parameters': f'{final[0]["parameters"]:,}',
    'runs': f'{len(study.runs):,}',
    'final': f'{len(final):,}',
    'seeds': str(len({run['settings']['RANDOM_SEED'] for run in final})),
    'free_small': f'{study.runs_of(dst())[0]["free"]:,}',
  }


def _claims(study: Study) -> dict[str, str]:
  """Returns the numbers of the text."""
  silos = 'per_module_and_layer'
  spiel, pruned = Setting('spiel', SMALL), Setting('prune_after', SMALL)
  others = {'lt_sft': Setting('lt_sft', SMALL), 'spiel': spiel}
  others |= {'snip': Setting('shira_snip', SMALL)}
  shrunk = {
    'cubic': (dst(start='1e-2', schedule='cubic'), dst()),
    'cubic_silos': (dst(silos, 'cubic', '1e-2'), dst(silos)),
    'cubic_spiel': (
      dataclasses.replace(spiel, schedule='cubic', start='1e-2'),
      spiel,
    ),
    'from_all': (dst(start='1.0', schedule='cubic'), dst()),
  }
  return {
    'silos': study.difference(dst(silos), dst()),
    'cubic_forgets': study.difference(*shrunk['cubic'], FORGETTING),
    'spiel_forgets': study.difference(*shrunk['cubic_spiel'], FORGETTING),
    'pruned': study.mean(pruned),
    'pruned_large': study.mean(Setting('prune_after', LARGE)),
    'dst_large': study.mean(Setting('dst', LARGE, 'none')),
    **{name: study.difference(cell, dst()) for name, cell in others.items()},
    **{name: study.difference(*pair) for name, pair in shrunk.items()},
  }


def page() -> str:
  """Returns the text of docs/family.md."""
  study = load()
  return (
    (HERE / 'family.md.in')
    .read_text()
    .format_map(
      _counts(study)
      | _claims(study)
      | {
        'winners_small': winners(study, SMALL),
        'winners_large': winners(study, LARGE),
        'shrinking': shrinking(study),
        'rates': rates(study),
      }
    )
  )


if __name__ == '__main__':
  PAGE.write_text(page())
