"""Figures of scores (paper: Fig. 1, 2, 4, 6)."""

from collections.abc import Iterable, Mapping, Sequence
import math
from typing import Any, NamedTuple

import numpy as np

from dst_t5x.analysis import cells as cells_lib
from dst_t5x.analysis import kinds
from dst_t5x.analysis import paper_tables
from dst_t5x.analysis import setups
from dst_t5x.analysis import style

Cell = cells_lib.Cell
METHODS = paper_tables.METHODS
_CURVES = ('dst', 'random', 'lora', 'prompt', 'ia3')


class Scores:
  """The scores of one task."""

  def __init__(
    self, task: str, cells: Sequence[Cell], metric: str, split: str
  ) -> None:
    """Stores the cells.

    Args:
      task: the task of the cells.
      cells: the cells of all models.
      metric: the metric to show.
      split: the split of the scores.
    """
    self.task, self.cells = task, cells
    self.metric, self.split = metric, split
    self.models = list(dict.fromkeys(cell.setup.model for cell in cells))

  def of(self, cell: Cell) -> cells_lib.Score:
    """Returns the score of a cell."""
    return cell.score(self.metric, self.split)

  def reference(self, model: str, method: str) -> cells_lib.Score | None:
    """Returns the score of a method without a budget, if it is known."""
    for cell in self.cells:
      if (cell.setup.model, cell.setup.method) == (model, method):
        score = self.of(cell)
        return score if score.values else None
    return None

  def curves(self, model: str) -> dict[str, list[Cell]]:
    """Returns method -> its cells, smallest budget first.

    Of DST's variants, the cells are those of the paper's, or of that with most
    budgets. Other methods have their best settings at each budget, by the
    development split.
    """
    by_method: dict[str, list[Cell]] = {}
    for cell in self.cells:
      if cell.setup.model == model:
        by_method.setdefault(cell.setup.method, []).append(cell)
    others = sorted(by_method.keys() - {*_CURVES, 'full', setups.ZERO_SHOT})
    return {
      method: self._main(by_method[method])
      for method in (*_CURVES, *others)
      if method in by_method
    }

  def _main(self, cells: Sequence[Cell]) -> list[Cell]:
    """Returns a cell for each budget of a method, the smallest first."""
    if cells[0].setup.method in setups.SUBSETS:
      return main_variant(cells)
    budgets: dict[float, list[Cell]] = {}
    for cell in cells:
      budgets.setdefault(cell.setup.knob, []).append(cell)
    return [
      cells_lib.best_on_dev(budgets[knob], self.metric)
      for knob in sorted(budgets)
    ]


class Panel(NamedTuple):
  """The curves of one panel.

  Attributes:
    title: the title; may be empty.
    model: the model.
    curves: method -> its cells, smallest budget first.
  """

  title: str
  model: str
  curves: Mapping[str, Sequence[Cell]]


def panels_of(scores: Scores, models: Sequence[str]) -> list[Panel]:
  """Returns the panels of some models: one each, or one for each kind.

  See `kinds.split`.
  """
  panels = []
  for model in models:
    curves = scores.curves(model)
    setup_of = {method: cells[0].setup for method, cells in curves.items()}
    for kind, part in kinds.split(curves, setup_of):
      named = model if len(models) > 1 or not kind else ''
      title = ': '.join(filter(None, (named, kind)))
      panels.append(Panel(title, model, part))
  return panels


def main_variant(cells: Sequence[Cell]) -> list[Cell]:
  """Returns the cells of the paper's variant, or of that with most budgets."""
  variants: dict[str, list[Cell]] = {}
  for cell in cells:
    variants.setdefault(cell.setup.variant, []).append(cell)
  best = max(variants.values(), key=lambda v: (v[0].setup.is_default, len(v)))
  return sorted(best, key=lambda cell: cell.setup.knob)


def all_figures(scores: Scores) -> list[style.Figure]:
  """Returns the figures for which there are scores."""
  made = [
    against_budget(scores, is_relative=True),
    against_budget(scores, is_relative=False),
    by_size(scores),
    variants(scores),
  ]
  return [figure for figure in made if figure is not None]


def against_budget(scores: Scores, is_relative: bool) -> style.Figure | None:
  """Draws the score against the share of free parameters (Fig. 1, Fig. 6)."""
  models = [
    model
    for model in scores.models
    if scores.curves(model)
    and (not is_relative or _is_base(scores.reference(model, 'full')))
  ]
  points = [
    c for m in models for v in scores.curves(m).values() for c in v if c.chosen
  ]
  if not points:
    return None
  parts = panels_of(scores, models)
  is_split = len(parts) > len(models)
  figure, axes = style.panels(
    len(parts), sharex=True, sharey=is_relative or is_split
  )
  for one, part in zip(axes, parts, strict=True):
    _draw_budgets(one, scores, part, is_relative)
    if len(parts) > 1:
      # Leaves room for notes on missing scores.
      one.set_title(part.title, pad=24)
  of = 'of full fine-tuning (%)' if is_relative else ''
  style.label_left(axes, _wrapped(f'{short(scores)} {of}'))
  style.legends(figure, axes, is_split)
  number, what = (1, 'relative') if is_relative else (6, 'absolute')
  curves = scores.curves(models[0])
  split_note = 'DST and full fine-tuning are in every panel. ' * is_split
  return style.finished(
    figure,
    f'figure_{number}_{scores.task}',
    f'Figure {number}: {scores.task}, score against budget, {what}',
    f'{about(scores)} Large markers are means, bars standard deviations, '
    'small dots single runs. '
    + split_note
    + _missing_note(scores.cells)
    + _variant_note(curves),
  )


def _is_base(full: cells_lib.Score | None) -> bool:
  """Returns whether a full fine-tuning's score can serve as 100 per cent."""
  return full is not None and bool(full.values) and full.mean != 0


def _draw_budgets(
  axes: Any, scores: Scores, panel: Panel, is_relative: bool
) -> None:
  model = panel.model
  full = scores.reference(model, 'full')
  base = full.mean if full and is_relative else 100.0
  for i, (method, cells) in enumerate(panel.curves.items()):
    name, look = METHODS.get(method, method), style.series(i)
    known = [(cell.fraction, scores.of(cell)) for cell in cells]
    points = [(100 * x, y.over(base)) for x, y in known if y.values]
    _draw_series(axes, points, name, look)
    # The budgets of methods without an ε are not known.
    lost = [
      cell.setup.epsilon
      for cell in cells
      if cell.setup.epsilon and not scores.of(cell).values
    ]
    if lost:
      axes.plot(
        [100 * x for x in lost], [1.03 + 0.05 * i] * len(lost), 'x+'[i % 2],
        color=look.color, markeredgewidth=2, clip_on=False,
        transform=axes.get_xaxis_transform(), label=f'{name}, missing',
      )  # fmt: skip
  _draw_level(axes, full, base, 'full fine-tuning', 'black', '-')
  zero = scores.reference(model, setups.ZERO_SHOT)
  _draw_level(axes, zero, base, 'zero-shot', style.GREY, (0, (1, 1)))
  axes.set_xscale('log')
  axes.set_xlabel('free parameters (% of the model)')


def _draw_series(
  axes: Any,
  points: Sequence[tuple[float, cells_lib.Score]],
  label: str,
  look: style.Style,
) -> None:
  """Draws means, their spread, and the single runs."""
  if not points:
    return
  x = [at for at, _ in points]
  axes.errorbar(
    x,
    [score.mean for _, score in points],
    yerr=np.nan_to_num([score.spread for _, score in points]),
    color=look.color,
    marker=look.marker,
    linestyle=look.linestyle,
    markeredgecolor='black',
    markeredgewidth=0.7,
    capsize=4,
    label=label,
    zorder=3,
  )
  single = [(at, value) for at, s in points for value in s.values]
  if len(single) > len(points):
    axes.plot(
      *zip(*single, strict=True), '.', color=look.color, markersize=4, zorder=4
    )


def _draw_level(
  axes: Any,
  score: cells_lib.Score | None,
  base: float,
  label: str,
  color: str,
  line: Any,
) -> None:
  """Draws a horizontal line and a band for the spread."""
  if score is None:
    return
  level = score.over(base)
  axes.axhline(
    level.mean, color=color, linestyle=line, linewidth=1.6, label=label
  )
  if not math.isnan(level.spread):
    axes.axhspan(
      level.mean - level.spread, level.mean + level.spread, color=color,
      alpha=0.12, linewidth=0,
    )  # fmt: skip


def by_size(scores: Scores) -> style.Figure | None:
  """Draws the score of DST against ε for each size of the model (Fig. 2)."""
  curves = {m: scores.curves(m).get('dst', []) for m in scores.models}
  curves = {
    m: found
    for m, cells in curves.items()
    if (found := [c for c in cells if scores.of(c).values])
  }
  if len(curves) < 2:
    return None
  curves = dict(
    sorted(curves.items(), key=lambda item: item[1][0].chosen[0].parameters)
  )
  is_relative = all(_is_base(scores.reference(m, 'full')) for m in curves)
  figure, axes = style.panels(1)
  for i, (model, cells) in enumerate(curves.items()):
    full = scores.reference(model, 'full')
    base = full.mean if full and is_relative else 100.0
    points = [(c.setup.knob, scores.of(c).over(base)) for c in cells]
    _draw_series(axes[0], points, model, style.series(i))
  axes[0].set_xscale('log')
  axes[0].set_xlabel('ε')
  of = 'of full fine-tuning (%)' if is_relative else ''
  style.label_left(axes, _wrapped(f'{short(scores)} {of}'))
  style.legend(figure, axes)
  return style.finished(
    figure,
    f'figure_2_{scores.task}',
    f'Figure 2: {scores.task}, DST by size of the model',
    about(scores) + _variant_note({'dst': next(iter(curves.values()))}),
  )


def variants(scores: Scores) -> style.Figure | None:
  """Draws mean and spread for distances and silos (Fig. 4, top)."""
  groups: dict[tuple[str, float], list[Cell]] = {}
  for cell in scores.cells:
    setup = cell.setup
    if (
      setup.method in setups.SUBSETS
      and setup.churn
      and not (setup.normalization or setup.more)
    ):
      groups.setdefault((setup.model, setup.knob), []).append(cell)
  groups = {
    key: found
    for key, cells in groups.items()
    if len({(c.setup.silos, c.setup.distance) for c in cells}) > 2
    and (found := [c for c in cells if scores.of(c).values])
  }
  if not groups:
    return None
  figure, axes = style.panels(len(groups), height=5.2)
  for one, ((model, knob), cells) in zip(axes, groups.items(), strict=True):
    _draw_variants(one, scores, cells)
    name = f'{model}, ' if len(scores.models) > 1 else ''
    one.set_title(f'{name}ε = {knob:g}')
  style.label_left(axes, _wrapped(short(scores)))
  style.legend(figure, axes)
  return style.finished(
    figure,
    f'figure_4_{scores.task}_scores',
    f'Figure 4 (top): {scores.task}, mean and spread by distance and silos',
    f'{about(scores)} Markers are means, bars standard deviations, dots '
    'single runs.',
  )


def _draw_variants(axes: Any, scores: Scores, cells: Iterable[Cell]) -> None:
  found = {(c.setup.distance, c.setup.silos): scores.of(c) for c in cells}
  distances = sorted({distance for distance, _ in found}, key=_distance_order)
  silos = [s for s in paper_tables.SILOS if s in {s for _, s in found}]
  silos += sorted({s for _, s in found} - {*silos})
  for i, distance in enumerate(distances):
    shift = 0.16 * (i - (len(distances) - 1) / 2)
    points = [
      (at + shift, found[distance, name])
      for at, name in enumerate(silos)
      if (distance, name) in found
    ]
    look = style.series(_distance_order(distance))
    look = style.Style(look.color, look.marker, 'none', '')
    _draw_series(axes, points, distance.replace('_', '-'), look)
  names = [
    paper_tables.SILOS.get(s, s).replace(' and ', '\nand ') for s in silos
  ]
  axes.set_xticks(range(len(silos)), names)
  axes.set_xlim(-0.6, len(silos) - 0.4)
  axes.set_xlabel('silos')


def _distance_order(distance: str) -> int:
  known = ('inverse_relative', 'relative', 'absolute', 'random')
  return known.index(distance) if distance in known else len(known)


def short(scores: Scores) -> str:
  """Returns the name of a metric for an axis."""
  return scores.metric.rpartition('/')[2].replace('_', ' ')


def _wrapped(label: str) -> str:
  """Returns a label, in two lines if it is long."""
  return label.strip().replace(' of full', '\nof full')


def about(scores: Scores) -> str:
  """Returns what the scores are, for captions."""
  text = f'{scores.metric} of the split {scores.split!r}.'
  if scores.split == cells_lib.DEV:
    text += ' Learning rates were chosen by the same split.'
  return text


def _missing_note(cells: Iterable[Cell]) -> str:
  missing = [cell for cell in cells if cell.missing]
  if not missing:
    return ''
  runs = sum(cell.missing for cell in missing)
  of = sum(cell.expected for cell in missing)
  return f'{runs} of {of} runs of {len(missing)} settings are missing. '


def _variant_note(curves: Mapping[str, Sequence[Cell]]) -> str:
  """Returns a note on the drawn variants that are not the paper's."""
  notes = []
  for method, cells in curves.items():
    drawn = dict.fromkeys(cell.setup.variant for cell in cells)
    is_usual = all(cell.setup.is_default for cell in cells) and len(drawn) < 2
    if any(drawn) and not is_usual:
      notes.append(f'{METHODS.get(method, method)}: {"; ".join(drawn)}.')
  return ' '.join(notes)
