"""Numbers of the ablation study, from its raw results.

    python studies/strings/study.py

writes docs/study.md, and into the heads of `launch/sweeps/study/*.yaml` and
`gin/methods/*.gin` what was measured with them.

`runs.jsonl` is what `python -m launch.records` says of the sweeps,
`operations.jsonl` what `operations.py` reads of their predictions,
`study.md.in` the text, in which {names} stand for what is computed here. No
number of the study's results is written by hand.
"""

import pathlib

import numpy as np
import study_heads as heads
import study_results as results
from study_results import LARGE
from study_results import MISSING
from study_results import SMALL
from study_results import Setting
from study_results import Study
import study_tables as tables

ROOT = results.HERE.parent.parent
PAGE = ROOT / 'docs' / 'study.md'
_SWEEPS = ROOT / 'launch' / 'sweeps' / 'study'
_METHODS = ROOT / 'gin' / 'methods'
_SILOS = {
  'none': 'none',
  'module': 'per_module',
  'layer': 'per_module_and_layer',
}
_SIZES = {'': SMALL, '_large': LARGE}
_LORA = {'1': '3.7e-3', '8': '3e-2', '50': '1.9e-1'}  # Rank -> equal budget.


def _free(study: Study, setting: Setting) -> str:
  count = tables.free(study, setting)
  return MISSING if count is None else f'{count:,}'


def _in_embedding(study: Study, setting: Setting) -> str:
  """Returns the mean share of the subset that is in the token embedding."""
  runs = study.runs_of(setting)
  if not runs:
    return MISSING
  shares = [run['modules']['token_embedder'] / run['free'] for run in runs]
  return f'{100 * np.mean(shares):.0f} %'


def _of_all_runs(study: Study) -> dict[str, str]:
  finished = [run for run in study.runs if run['state'] == 'finished']
  seconds = [run['seconds'] for run in finished if run['seconds']]
  return {
    'runs': str(len(finished)),
    'planned': str(len(study.runs)),
    'median_seconds': f'{np.median(seconds):.0f}',
    'parameters': f'{finished[0]["parameters"]:,}',
  }


def _by_silos(study: Study) -> dict[str, str]:
  """Returns churn, spread and distances, for each kind of silos."""
  found = {}
  for name, silos in _SILOS.items():
    for size, budget in _SIZES.items():
      churn, without = (
        results.dst(budget, silos),
        results.no_churn(budget, silos),
      )
      found[f'churn_{name}{size}'] = study.difference(churn, without)
      deviation, _ = tables.pooled(study, silos, budget)
      found[f'spread_{name}{size}'] = f'{deviation:.1f}'
    inverse = results.dst(SMALL, silos)
    for distance in ('relative', 'absolute'):
      other = results.dst(SMALL, silos, distance)
      found[f'{distance}_{name}'] = study.difference(inverse, other)
  return found


def _rivals(study: Study) -> dict[str, str]:
  """Returns DST less other methods of equal budgets."""
  budgets = {'tiny': '1e-4', 'small': SMALL, 'large': LARGE, 'tenth': '1e-1'}
  found = {
    f'random_{name}': study.difference(results.dst(b), results.random(b))
    for name, b in budgets.items()
  }
  for rank, budget in _LORA.items():
    lora = Setting('lora', rank)
    found[f'lora_{rank}'] = study.difference(results.dst(budget), lora)
    found[f'lora_{rank}_free'] = _free(study, lora)
  ia3, norms = Setting('ia3'), Setting('norms')
  return found | {
    'lora_budget': _free(study, results.dst(_LORA['1'])),
    'ia3': study.difference(results.dst('1.86e-3'), ia3),
    'ia3_free': _free(study, ia3),
    'norms': study.difference(results.dst(SMALL), norms),
    'norms_none': study.difference(results.dst(SMALL, 'none'), norms),
    'norms_free': _free(study, norms),
  }


def _of_dst(study: Study) -> dict[str, str]:
  without, silos = results.dst(SMALL, 'none'), results.dst(SMALL)
  by_size = results.normalized(SMALL, 'size', 'per_module_and_layer')
  return {
    'tiny': _free(study, results.dst('1e-4')),
    'small_free': _free(study, silos),
    'most': _free(study, results.dst('5e-1')),
    'rate_tiny': f'{study.best_rate(results.dst("1e-4")):g}',
    'rate_tenth': f'{study.best_rate(results.dst("1e-1")):g}',
    'silos': study.difference(without, silos),
    'silos_large': study.difference(
      results.dst(LARGE, 'none'), results.dst(LARGE)
    ),
    'by_size': study.difference(by_size, without),
    'embedding_none': _in_embedding(study, without),
    'embedding_layer': _in_embedding(study, silos),
  }


def values(study: Study) -> dict[str, str]:
  """Returns name -> what stands for it in the text."""
  shown = (
    *(tables.budgets, tables.against_random, tables.operations, tables.rates),
    *(tables.table_2, tables.table_3, tables.table_7, tables.spread),
  )
  return {
    **_of_all_runs(study),
    **_of_dst(study),
    **_by_silos(study),
    **_rivals(study),
    **{make.__name__: make(study) for make in shown},
  }


def page() -> str:
  """Returns the text of docs/study.md."""
  text = (results.HERE / 'study.md.in').read_text()
  return text.format_map(values(results.load()))


def _write(path: pathlib.Path, head: list[str]) -> None:
  path.write_text(heads.with_head(path.read_text(), head))


def main() -> None:
  """Writes everything."""
  PAGE.write_text(page())
  study = results.load()
  for sweep in dict.fromkeys(run['sweep'] for run in study.runs):
    _write(_SWEEPS / f'{sweep}.yaml', heads.head(study, sweep))
  for method in sorted({setting.method for setting in study.cells}):
    path = _METHODS / f'{method}.gin'
    if path.exists():  # Zero-shot has none.
      _write(path, heads.method_head(study, method))


if __name__ == '__main__':
  main()
