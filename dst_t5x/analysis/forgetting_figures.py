"""Figures of scores against forgetting, the rise of the loss on other text."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from dst_t5x.analysis import cells as cells_lib
from dst_t5x.analysis import paper_tables
from dst_t5x.analysis import score_figures
from dst_t5x.analysis import setups
from dst_t5x.analysis import style

Cell = cells_lib.Cell
METHODS = paper_tables.METHODS
# From this ratio of the largest to the smallest rise on, the axis is one of
# logarithms.
_WIDE = 30.0


def all_figures(scores: score_figures.Scores) -> list[style.Figure]:
  """Returns a figure for each model that has runs with held-out text."""
  made = [against_forgetting(scores, model) for model in scores.models]
  return [figure for figure in made if figure is not None]


def against_forgetting(
  scores: score_figures.Scores, model: str
) -> style.Figure | None:
  """Draws the score against the forgetting of each method, over its budgets.

  Args:
    scores: the scores of one task.
    model: the model.

  Returns:
    The figure; None if no run has both.
  """
  known = [
    cell
    for cells in scores.curves(model).values()
    for cell in cells
    if _is_known(scores, cell)
  ]
  if not known:
    return None
  parts = score_figures.panels_of(scores, [model])
  is_split = len(parts) > 1
  figure, axes = style.panels(len(parts), sharex=True, sharey=is_split)
  for one, part in zip(axes, parts, strict=True):
    _draw(one, scores, part)
    if is_split:
      one.set_title(part.title)
  rises = [rise.mean for cell in known if (rise := cell.forgetting).values]
  if min(rises) > 0 and max(rises) > _WIDE * min(rises):
    axes[0].set_xscale('log')
  style.label_left(axes, score_figures.short(scores))
  style.legends(figure, axes, is_split)
  where = ', '.join(filter(None, (model, scores.task)))
  return style.finished(
    figure,
    f'forgetting_{scores.task}_{model}',
    f'Forgetting: {where}, score against the rise of the loss on held-out text',
    f'{score_figures.about(scores)} Forgetting is that of the same checkpoint: '
    'the loss on held-out text less that of the seed, in nats per token. Lines '
    'go from the smallest budget (small marker) to the largest. Markers are '
    'means, bars standard deviations.',
  )


def _is_known(scores: score_figures.Scores, cell: Cell) -> bool:
  return bool(scores.of(cell).values and cell.forgetting.values)


def _draw(
  axes: Any, scores: score_figures.Scores, panel: score_figures.Panel
) -> None:
  for i, (method, cells) in enumerate(panel.curves.items()):
    known = [cell for cell in cells if _is_known(scores, cell)]
    name = METHODS.get(method, method)
    _draw_method(axes, scores, known, name, style.series(i))
  full = [
    cell
    for cell in scores.cells
    if (cell.setup.model, cell.setup.method) == (panel.model, 'full')
    and _is_known(scores, cell)
  ]
  look = style.Style('black', 'h', '-', '')
  _draw_method(axes, scores, full, METHODS['full'], look)
  zero = scores.reference(panel.model, setups.ZERO_SHOT)
  if zero is not None:
    axes.axhline(
      zero.mean, color=style.GREY, linestyle=(0, (1, 1)), label='zero-shot'
    )
  axes.set_xlabel('forgetting (nats per token)')


def _draw_method(
  axes: Any,
  scores: score_figures.Scores,
  cells: Sequence[Cell],
  label: str,
  look: style.Style,
) -> None:
  """Draws a line over budgets, with markers that grow with the budget."""
  if not cells:
    return
  x = [cell.forgetting for cell in cells]
  y = [scores.of(cell) for cell in cells]
  axes.errorbar(
    [score.mean for score in x],
    [score.mean for score in y],
    xerr=np.nan_to_num([score.spread for score in x]),
    yerr=np.nan_to_num([score.spread for score in y]),
    color=look.color,
    marker=look.marker,
    markersize=5,
    linestyle=look.linestyle,
    linewidth=1.6,
    elinewidth=1.0,
    capsize=2,
    label=label,
    zorder=3,
  )
  axes.scatter(
    [score.mean for score in x],
    [score.mean for score in y],
    s=np.linspace(140, 30, len(cells))[::-1],
    color=look.color,
    marker=look.marker,
    edgecolors='black',
    linewidths=0.7,
    zorder=4,
  )
