"""Figures of training: speed and learning rates (paper: Fig. 5, 9)."""

from collections.abc import Sequence
from typing import Any

from matplotlib import ticker
import numpy as np

from dst_t5x.analysis import cells as cells_lib
from dst_t5x.analysis import paper_tables
from dst_t5x.analysis import score_figures
from dst_t5x.analysis import setups
from dst_t5x.analysis import style

Cell = cells_lib.Cell
METHODS = paper_tables.METHODS


def all_figures(scores: score_figures.Scores) -> list[style.Figure]:
  """Returns the figures for which there are scores."""
  made = [speed(scores), learning_rates(scores)]
  return [figure for figure in made if figure is not None]


def speed(scores: score_figures.Scores) -> style.Figure | None:
  """Draws the training speed of each method (Fig. 5)."""
  models = {
    model: rates
    for model in scores.models
    if len(rates := _rates(scores, model)) > 1
  }
  if not models:
    return None
  most = max(map(len, models.values()))
  figure, axes = style.panels(
    len(models), height=1.6 + 0.55 * most, columns=1, width=7.0
  )
  for one, (model, rates) in zip(axes, models.items(), strict=True):
    names = list(rates)
    means = [float(np.mean(rates[name])) for name in names]
    one.barh(
      names,
      means,
      xerr=[
        float(np.std(r, ddof=1)) if len(r) > 1 else 0.0 for r in rates.values()
      ],
      color='0.75',
      edgecolor='black',
      capsize=4,
      height=0.6,
    )
    one.invert_yaxis()
    one.grid(visible=False, axis='y')
    one.set_xlabel('training steps per second')
    if len(models) > 1:
      one.set_title(model)
  return style.finished(
    figure,
    f'figure_5_{scores.task}',
    f'Figure 5: {scores.task}, training speed',
    'Of each run the median over its reports, the first one apart, which has '
    'the compilation; bars are means over runs, with their standard deviation. '
    'Only runs on the same hardware can be compared.',
  )


def _rates(scores: score_figures.Scores, model: str) -> dict[str, list[float]]:
  """Returns method -> steps per second of its runs."""
  rates: dict[str, list[float]] = {}
  order = [*METHODS]
  cells = sorted(
    (c for c in scores.cells if c.setup.model == model),
    key=lambda c: (
      order.index(c.setup.method) if c.setup.method in order else len(order)
    ),
  )
  for cell in cells:
    name = METHODS.get(cell.setup.method, cell.setup.method)
    name += f', {cell.setup.more}' if cell.setup.more else ''
    for run in cell.chosen:
      if len(run.rates) > 1:
        rates.setdefault(name, []).append(float(np.median(run.rates[1:])))
  return rates


def _spread(values: Sequence[float]) -> float:
  return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def learning_rates(scores: score_figures.Scores) -> style.Figure | None:
  """Draws the best learning rate against ε (Fig. 9)."""
  curves: dict[str, list[Cell]] = {}
  for model in scores.models:
    for method in setups.SUBSETS:
      cells = scores.curves(model).get(method, [])
      tuned = [c for c in cells if c.learning_rate and len(c.tried) > 1]
      name = f'{METHODS[method]}, {model}'
      if tuned:
        curves[name if len(scores.models) > 1 else METHODS[method]] = tuned
  if not any(len(cells) > 1 for cells in curves.values()):
    return None
  figure, axes = style.panels(1)
  for i, (name, cells) in enumerate(curves.items()):
    # Shifts points so that they do not hide each other.
    shift = 1 + 0.12 * (i - (len(curves) - 1) / 2)
    _draw_rates(axes[0], name, cells, style.series(i), shift)
  axes[0].set_xscale('log')
  axes[0].set_yscale('log')
  axes[0].set_xlabel('ε')
  axes[0].set_ylabel('best learning rate')
  axes[0].yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
  axes[0].yaxis.set_major_formatter(ticker.FormatStrFormatter('%g'))
  axes[0].yaxis.set_minor_locator(ticker.NullLocator())
  style.legend(figure, axes, columns=2)
  return style.finished(
    figure,
    f'figure_9_{scores.task}',
    f'Figure 9: {scores.task}, best learning rate against ε',
    f'By the mean of {scores.metric} on the development split. Dashes are the '
    'learning rates that were tried.'
    + (
      ' Where the marker is open, the best is the lowest or highest of them, '
      'and a better one may lie outside.'
      if any(cell.is_at_edge for cells in curves.values() for cell in cells)
      else ''
    ),
  )


def _draw_rates(
  axes: Any, name: str, cells: Sequence[Cell], look: style.Style, shift: float
) -> None:
  """Draws the best learning rates and all that were tried."""
  x = [cell.setup.knob * shift for cell in cells]
  y = [cell.learning_rate for cell in cells]
  for at, cell in zip(x, cells, strict=True):
    axes.plot(
      [at] * len(cell.tried), list(cell.tried), '_', color='0.5', markersize=11
    )
  axes.plot(
    x, y, color=look.color, marker=look.marker, linestyle=look.linestyle,
    label=name,
  )  # fmt: skip
  at_edge = [
    (a, b) for a, b, c in zip(x, y, cells, strict=True) if c.is_at_edge
  ]
  if at_edge:
    axes.plot(
      *zip(*at_edge, strict=True), look.marker, color=look.color,
      markerfacecolor='white', markeredgewidth=2, zorder=4,
    )  # fmt: skip
