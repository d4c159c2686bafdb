"""Figures of the overlap of subsets (paper: Fig. 7, 8; Eq. 9)."""

from collections.abc import Mapping, Sequence
import itertools
from typing import Any

import numpy as np

from dst_t5x import subsets as subset_lib
from dst_t5x.analysis import cells as cells_lib
from dst_t5x.analysis import module_figures
from dst_t5x.analysis import paper_tables
from dst_t5x.analysis import runs as runs_lib
from dst_t5x.analysis import setups
from dst_t5x.analysis import style
from dst_t5x.analysis import subsets as subsets_lib
from dst_t5x.analysis import tables

Run = runs_lib.Run
Subset = subset_lib.Subset
_EQ_9 = 'Eq. 9: the share of the row’s subset that the column’s has, too.'
# With more runs, pairs are not drawn; above the second limit, not compared.
_MOST_IN_PICTURE = 16
_MOST_RUNS = 64
# Limit over all runs; a position takes eight bytes.
_MOST_POSITIONS = 200_000_000


def over_time(
  task: str, cells: Sequence[cells_lib.Cell], reader: subsets_lib.Reader
) -> tuple[list[style.Figure], list[tables.Table]]:
  """Draws the overlap of every two checkpoints of a run (Fig. 7).

  Args:
    task: the task of the cells.
    cells: the cells of all models; the run with the lowest random seed of each
      is drawn.
    reader: reads the subsets.
  """
  matrices: dict[str, tuple[list[int], np.ndarray]] = {}
  rows: list[list[tables.Value]] = []
  drawn = [
    cell
    for cell in module_figures.plain(cells)
    if cell.setup.churn and cell.setup.distance == 'inverse_relative'
  ]
  for cell in sorted(drawn, key=lambda c: (c.setup.silos, c.setup.knob)):
    run = cell.chosen[0]
    subsets = reader.over_time(run)
    if len(subsets) < 2:
      continue
    steps = list(subsets)
    overlaps = matrix(list(subsets.values()))
    name = _cell_name(cell.setup, cells)
    matrices[name] = steps, 100 * _eq_9(overlaps)
    rows += [
      [run.name, steps[i], steps[j], *_numbers(overlaps[i][j])]
      for i, j in itertools.combinations(range(len(steps)), 2)
    ]
  if not matrices:
    return [], []
  table = tables.Table(
    f'overlap_checkpoints_{task}',
    f'Overlap of checkpoints ({task})',
    ('run', 'step', 'later step', 'first', 'second', 'shared',
     'Eq. 9 (%)', 'Jaccard (%)'),
    rows,
    is_long=True,
  )  # fmt: skip
  return [_draw_steps(task, matrices)], [table]


def _draw_steps(
  task: str, matrices: Mapping[str, tuple[Sequence[int], np.ndarray]]
) -> style.Figure:
  figure, axes = style.panels(len(matrices), width=5.6, height=4.6)
  for one, (name, (steps, values)) in zip(axes, matrices.items(), strict=True):
    labels = [f'{step:,}' for step in steps]
    style.heatmap(one, values, labels, labels)
    one.set_title(name, fontsize=12)
    one.set_xlabel('step')
    one.set_ylabel('step')
  return style.finished(
    figure,
    f'figure_7_{task}',
    f'Figure 7: {task}, overlap of the subsets of every two checkpoints (%)',
    f'{_EQ_9} Of each setting the run with the lowest random seed.',
  )


def _cell_name(setup: setups.Setup, cells: Sequence[cells_lib.Cell]) -> str:
  several = len({cell.setup.model for cell in cells}) > 1
  silos = paper_tables.SILOS.get(setup.silos, setup.silos)
  return (
    f'{f"{setup.model}, " if several else ""}silos: {silos}, ' + setup.budget
  )


def matrix(subsets: Sequence[Subset]) -> list[list[subset_lib.Overlap]]:
  """Returns the overlaps of all pairs; [i][j] is that of the i-th and j-th.

  Raises:
    UserError: the subsets have different seeds.
  """
  overlaps = [
    [subset_lib.Overlap(s.size, s.size, s.size)] * len(subsets) for s in subsets
  ]
  for i, j in itertools.combinations(range(len(subsets)), 2):
    both = subset_lib.overlap(subsets[i], subsets[j])
    overlaps[i][j] = both
    overlaps[j][i] = subset_lib.Overlap(both.shared, both.second, both.first)
  return overlaps


def _eq_9(overlaps: Sequence[Sequence[subset_lib.Overlap]]) -> np.ndarray:
  """Returns |A ∩ B| / |A|, [rows, columns]."""
  return np.array([[overlap.share for overlap in row] for row in overlaps])


def _numbers(overlap: subset_lib.Overlap) -> list[tables.Value]:
  return [
    overlap.first,
    overlap.second,
    overlap.shared,
    100 * overlap.share,
    100 * overlap.jaccard,
  ]


def between_runs(
  cells: Sequence[cells_lib.Cell], reader: subsets_lib.Reader
) -> tuple[list[style.Figure], list[tables.Table]]:
  """Draws the overlap of subsets of different runs (Fig. 8).

  Args:
    cells: the cells of all tasks and models.
    reader: reads the subsets.
  """
  rows: list[list[tables.Value]] = []
  means: list[tuple[str, str, dict[str, Any]]] = []
  notes = []
  for (_, knob), several in _comparable(cells).items():
    read = _read(several, reader)
    if len(read) < 2:
      continue
    if len(read) < len(several):
      notes.append(f'{len(read)} of {len(several)} runs with ε = {knob:g}.')
    runs = [run for run, _ in read]
    overlaps = matrix([subset for _, subset in read])
    rows += [
      [f'{knob:g}', runs[i].name, runs[j].name, *_numbers(overlaps[i][j])]
      for i, j in itertools.combinations(range(len(runs)), 2)
    ]
    means += _means(runs, _eq_9(overlaps))
  if not rows:
    return [], []
  figures = [
    _draw_means(kind, f'overlap between {kind} (%)', chosen)
    for kind in ('distances', 'tasks', 'runs')
    if (chosen := {name: m for of, name, m in means if of == kind})
  ]
  table = tables.Table(
    'overlap_runs',
    'Overlap of runs',
    ('ε', 'run', 'other run', 'first', 'second', 'shared', 'Eq. 9 (%)',
     'Jaccard (%)'),
    rows,
    notes,
    is_long=True,
  )  # fmt: skip
  return figures, [table]


def _comparable(
  cells: Sequence[cells_lib.Cell],
) -> dict[tuple[str, float], list[Run]]:
  """Returns the runs of each seed and budget."""
  groups: dict[tuple[str, float], list[Run]] = {}
  for cell in module_figures.plain(cells):
    if cell.setup.churn:
      for run in cell.chosen:
        key = run.fingerprint, cell.setup.knob
        groups.setdefault(key, []).append(run)
  return groups


def _read(
  runs: Sequence[Run], reader: subsets_lib.Reader
) -> list[tuple[Run, Subset]]:
  """Returns the runs with a subset, as many as can be compared."""
  read: list[tuple[Run, Subset]] = []
  positions = 0
  # One run of every setting comes before a second one of any.
  for run in sorted(runs, key=lambda run: run.trial.random_seed):
    if len(read) == _MOST_RUNS or positions > _MOST_POSITIONS:
      break
    subset = reader.at_end(run)
    if subset is not None and subset.size:
      read.append((run, subset))
      positions += subset.size
  return read


def _means(
  runs: Sequence[Run], values: np.ndarray
) -> list[tuple[str, str, dict[str, Any]]]:
  """Returns kind, panel and matrix: means over pairs of runs."""
  matrices = []
  by_place: dict[tuple[str, str, str], list[int]] = {}
  by_method: dict[tuple[str, str, str], list[int]] = {}
  for i, run in enumerate(runs):
    s = run.setup
    by_place.setdefault((s.model, s.task, s.silos), []).append(i)
    by_method.setdefault((s.model, s.distance, s.silos), []).append(i)
  knob = f'ε = {runs[0].setup.knob:g}'
  for (model, task, silos), members in by_place.items():
    names = [runs[i].setup.distance.replace('_', '-') for i in members]
    if len({*names} - {'random'}) > 1:
      panel = f'{_panel(model, runs)}{task}, {knob}\n{_silos(silos)}'
      matrices.append(('distances', panel, _averaged(names, members, values)))
  for (model, distance, silos), members in by_method.items():
    names = [runs[i].setup.task for i in members]
    if len(set(names)) > 1:
      name = distance.replace('_', '-')
      panel = f'{_panel(model, runs)}{name}, {knob}\n{_silos(silos)}'
      matrices.append(('tasks', panel, _averaged(names, members, values)))
  if not matrices and len(runs) <= _MOST_IN_PICTURE:
    all_runs = {
      'labels': [str(i + 1) for i in range(len(runs))],
      'values': 100 * values,
      'names': _different_parts([run.name for run in runs]),
    }
    matrices.append(('runs', knob, all_runs))
  return matrices


def _silos(silos: str) -> str:
  return f'silos: {paper_tables.SILOS.get(silos, silos)}'


def _panel(model: str, runs: Sequence[Run]) -> str:
  return f'{model}, ' if len({r.setup.model for r in runs}) > 1 else ''


def _different_parts(names: Sequence[str]) -> list[str]:
  """Returns the parts of the names that differ, of folders of one sweep."""
  split = [name.split('_') for name in names]
  if len({len(parts) for parts in split}) > 1:
    return list(names)
  kept = [i for i in range(len(split[0])) if len({p[i] for p in split}) > 1]
  return ['_'.join(parts[i] for i in kept) for parts in split]


def _averaged(
  names: Sequence[str], members: Sequence[int], values: np.ndarray
) -> dict[str, Any]:
  """Returns the mean over pairs of different runs, by the runs' names."""
  labels = sorted(set(names))
  where = {
    label: [i for i, n in zip(members, names, strict=True) if n == label]
    for label in labels
  }
  averaged = np.full((len(labels), len(labels)), np.nan)
  for (i, a), (j, b) in itertools.product(enumerate(labels), repeat=2):
    pairs = [values[m, n] for m in where[a] for n in where[b] if m != n]
    if pairs:
      averaged[i, j] = 100 * np.mean(pairs)
  return {'labels': labels, 'values': averaged}


def _draw_means(
  kind: str, title: str, panels: Mapping[str, Mapping[str, Any]]
) -> style.Figure:
  most = max(len(panel['labels']) for panel in panels.values())
  size = 3.4 + 0.5 * most
  figure, axes = style.panels(len(panels), width=size + 1, height=size)
  for one, (name, panel) in zip(axes, panels.items(), strict=True):
    style.heatmap(one, panel['values'], panel['labels'], panel['labels'])
    one.set_title(name, fontsize=12)
  caption = (
    'Means over pairs of runs; on the diagonal of runs with different random '
    'seeds.'
  )
  if kind == 'runs':  # Names of runs are too long for an axis.
    caption = ' '.join(
      f'{name}: '
      + ', '.join(f'{i} {run}' for i, run in enumerate(panel['names'], 1))
      + '.'
      for name, panel in panels.items()
    )
  return style.finished(
    figure, f'figure_8_{kind}', f'Figure 8: {title}', f'{_EQ_9} {caption}'
  )
