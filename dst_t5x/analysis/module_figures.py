"""Figures of the free parameters' modules (paper: Fig. 4, bottom)."""

from collections.abc import Mapping, Sequence
import math
from typing import Any

import numpy as np

from dst_t5x.analysis import cells as cells_lib
from dst_t5x.analysis import paper_tables
from dst_t5x.analysis import runs as runs_lib
from dst_t5x.analysis import setups
from dst_t5x.analysis import style
from dst_t5x.analysis import subsets as subsets_lib
from dst_t5x.analysis import tables
from dst_t5x.models import families

Run = runs_lib.Run


def plain(cells: Sequence[cells_lib.Cell]) -> list[cells_lib.Cell]:
  """Returns the cells of subsets chosen by distance and silos."""
  return [
    cell
    for cell in cells
    if cell.setup.method in setups.SUBSETS
    and cell.chosen
    and not cell.setup.normalization
    and not cell.setup.more
  ]


def shares(
  task: str, cells: Sequence[cells_lib.Cell], reader: subsets_lib.Reader
) -> tuple[list[style.Figure], list[tables.Table]]:
  """Draws the share of free parameters in each module (Fig. 4, bottom).

  Args:
    task: the task of the cells.
    cells: the cells of all models.
    reader: reads the subsets.
  """
  panels: dict[tuple[str, str, float], dict[str, Any]] = {}
  rows: list[list[tables.Value]] = []
  for cell in plain(cells):
    setup = cell.setup
    if not setup.churn:
      continue
    counted = [c for run in cell.chosen if (c := _counts(run, reader))]
    if not counted:
      continue
    key = setup.model, setup.silos, setup.knob
    panels.setdefault(key, {})[setup.distance] = counted
    rows += _rows(setup, counted)
  if not rows:
    return [], []
  table = tables.Table(
    f'modules_{task}',
    f'Free parameters per module ({task})',
    ('model', 'silos', 'ε', 'distance', 'module', 'of all free (%)',
     'of the model (%)'),
    rows,
    ['Mean ± standard deviation (number of random seeds).'],
    is_long=True,
  )  # fmt: skip
  return [_draw_shares(task, panels)], [table]


def _rows(
  setup: setups.Setup, counted: Sequence[Mapping[str, tuple[int, int]]]
) -> list[list[tables.Value]]:
  """Returns one row of the table for each module."""
  return [
    [
      setup.model,
      paper_tables.SILOS.get(setup.silos, setup.silos),
      f'{setup.knob:g}',
      setup.distance.replace('_', '-'),
      module,
      cells_lib.Score(tuple(100 * _share(c, module) for c in counted)),
      100 * _share(counted[0], module, of_model=True),
    ]
    for module in counted[0]
  ]


def _counts(run: Run, reader: subsets_lib.Reader) -> dict[str, tuple[int, int]]:
  """Returns module -> numbers of free and of all parameters of a run."""
  subset = reader.at_end(run)
  if subset is not None:
    return subsets_lib.modules(subset) if subset.size else {}
  counts: dict[str, tuple[int, int]] = {}
  # Metrics have the free parameters, but not the sizes.
  if len(run.modules) > 1:
    family = families.of_paths(run.modules.keys())
    for name, value in run.modules.items():
      module = family.module_name(name)
      free, _ = counts.get(module, (0, 0))
      counts[module] = free + int(value), 0
  return counts if any(free for free, _ in counts.values()) else {}


def _share(
  counts: Mapping[str, tuple[int, int]], module: str, of_model: bool = False
) -> float:
  values = {name: count[of_model] for name, count in counts.items()}
  total = sum(values.values())
  return values.get(module, 0) / total if total else math.nan


def _draw_shares(
  task: str, panels: Mapping[tuple[str, str, float], Mapping[str, Any]]
) -> style.Figure:
  # Silos fix the shares, so shares are drawn for runs without silos.
  free = {
    key: distances
    for key, distances in panels.items()
    if key[1] == 'none' and distances.keys() - {'random'}
  }
  shown = free or dict(panels)
  modules = list(next(iter(next(iter(shown.values())).values()))[0])
  most = max(len(distances) for distances in shown.values())
  height = 1.8 + len(modules) * (0.22 + 0.15 * most)
  figure, axes = style.panels(len(shown), height=height, sharey=True)
  models = {model for model, _, _ in shown}
  for one, (key, distances) in zip(axes, shown.items(), strict=True):
    _draw_modules(one, modules, distances)
    model, silos, knob = key
    name = f'{model}, ' if len(models) > 1 else ''
    silos = (
      ''
      if silos == 'none'
      else f'silos: {paper_tables.SILOS.get(silos, silos)}\n'
    )
    one.set_title(f'{silos}{name}ε = {knob:g}')
  axes[0].invert_yaxis()
  style.legend(figure, axes)
  is_whole = {key[1] for key in shown} == {'none'}
  return style.finished(
    figure,
    f'figure_4_{task}_modules',
    f'Figure 4 (bottom): {task}, where the free parameters are',
    ('One silo for the whole model. ' if is_whole else '')
    + 'Bars are means over random seeds, with their standard deviation; the '
    'black ticks are the shares of the modules in the model.',
  )


def _draw_modules(
  axes: Any, modules: Sequence[str], distances: Mapping[str, Any]
) -> None:
  order = ('inverse_relative', 'relative', 'absolute', 'random')
  width = 0.8 / len(distances)
  names = [d for d in order if d in distances]
  names += [d for d in distances if d not in order]
  for i, distance in enumerate(names):
    counted = distances[distance]
    look = style.series(order.index(distance) if distance in order else 4)
    values = np.array(
      [[100 * _share(c, module) for module in modules] for c in counted]
    )
    at = np.arange(len(modules)) + width * (i - (len(distances) - 1) / 2)
    axes.barh(
      at,
      values.mean(axis=0),
      height=width,
      xerr=values.std(axis=0, ddof=1) if len(values) > 1 else None,
      color=look.color,
      hatch=look.hatch,
      edgecolor='white',
      linewidth=0,
      error_kw={'elinewidth': 1.2, 'capsize': 2},
      label=distance.replace('_', '-'),
    )
  counts = distances[names[0]][0]
  sizes = [100 * _share(counts, module, of_model=True) for module in modules]
  if not any(map(math.isnan, sizes)):
    axes.plot(
      sizes, range(len(modules)), '|', color='black', markersize=16,
      markeredgewidth=2, label='share of the model',
    )  # fmt: skip
  axes.set_yticks(range(len(modules)), modules)
  axes.set_xlabel('of all free parameters (%)')
  axes.set_xlim(left=0)
  axes.grid(visible=False, axis='y')
