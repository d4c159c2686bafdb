"""The figure of docs/family.md: characters against forgetting.

python studies/family/family_figure.py
"""

from typing import Any

import family
import numpy as np

from dst_t5x.analysis import style

FILE = family.HERE / 'forgetting.png'
# The other schedules are in the table.
_SCHEDULES = ('constant', ''), ('cubic', '1e-2')
# Where a label is, if not to the right of its point.
_LEFT = ((-7, -3), 'right')
_PLACES = {
  'DST, silos per module and layer': _LEFT,
  'DST, silos per module and layer, cubic, from 0.01': _LEFT,
  'SHiRA, SNIP': ((0, 7), 'center'),
}


def main() -> None:
  """Draws the figure."""
  study = family.load()
  cells = [
    cell
    for cell in study.cells
    if cell.budget == family.SMALL
    and len(study.values(cell))
    # The same as FISH.
    and cell.method != 'child_tuning'
    and (cell.schedule, cell.start) in _SCHEDULES
  ]
  with style.applied():
    figure, [axes] = style.panels(1, width=9.0, height=5.5)
    for cell in sorted(cells):
      _draw(axes, study, cell)
    axes.set_xlabel('forgetting (nats per byte)')
    axes.set_ylabel('characters right (%)')
    made = style.finished(figure, 'forgetting', '', '')
  FILE.write_bytes(made.png)


def _draw(axes: Any, study: family.Study, cell: family.Setting) -> None:
  is_constant = cell.schedule == 'constant'
  look = style.series(0 if cell.method == 'dst' else 1)
  point = [
    float(np.mean(study.values(cell, metric)))
    for metric in (family.FORGETTING, family.SCORE)
  ]
  axes.plot(*point, 'o' if is_constant else 'v', color=look.color)
  name = family.name(cell)
  if not is_constant:
    name += f', {family.schedule(cell)}'
  place, side = _PLACES.get(name, ((7, -3), 'left'))
  axes.annotate(
    name,
    point,
    xytext=place,
    textcoords='offset points',
    ha=side,
    fontsize=8,
  )


if __name__ == '__main__':
  main()
