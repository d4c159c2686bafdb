"""The style of figures: readable at half width and without colours."""

from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
import io
from typing import Any

import matplotlib
from matplotlib import figure as figure_lib
import numpy as np

# Colours of Okabe and Ito (2008), which differ in lightness too.
_COLOURS = (
  '#d55e00', '#0072b2', '#009e73', '#cc79a7', '#e69f00', '#56b4e9', '0.55',
  '#f0e442',
)  # fmt: skip
_MARKERS = 'osD^vPX*'
_LINES = ('-', '--', '-.', ':', (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)),
          (0, (1, 3)), (0, (3, 1)))  # fmt: skip
_HATCHES = ('', '///', '...', 'xx', '\\\\\\', '++', 'oo', '**')
GREY = '0.35'
_PARAMETERS = {
  'axes.grid': True,
  'axes.spines.right': False,
  'axes.spines.top': False,
  'figure.dpi': 150,
  'font.size': 13,
  'grid.alpha': 0.35,
  'legend.fontsize': 11.5,
  'legend.frameon': False,
  'lines.linewidth': 2.0,
  'lines.markersize': 8,
  'svg.fonttype': 'path',
  # A fixed salt makes equal figures equal files.
  'svg.hashsalt': 'dst_t5x',
}


@dataclasses.dataclass(frozen=True)
class Style:
  """The style of one series."""

  color: str
  marker: str
  linestyle: Any
  hatch: str


@dataclasses.dataclass(frozen=True)
class Figure:
  """A figure of the report.

  Attributes:
    name: the name of its files.
    title: the title.
    caption: how to read the figure.
    width: width in inches.
    png: the picture as PNG.
    svg: the picture as SVG.
  """

  name: str
  title: str
  caption: str
  width: float
  png: bytes
  svg: bytes


def series(i: int) -> Style:
  """Returns the style of the i-th series; styles repeat after eight."""
  i %= len(_COLOURS)
  return Style(_COLOURS[i], _MARKERS[i], _LINES[i], _HATCHES[i])


@contextlib.contextmanager
def applied() -> Iterator[None]:
  """Applies the style inside the context."""
  with matplotlib.rc_context(_PARAMETERS):
    yield


def panels(
  count: int,
  width: float = 6.4,
  height: float = 4.6,
  columns: int = 2,
  **options: Any,
) -> tuple[figure_lib.Figure, list[Any]]:
  """Returns a figure with several axes, in rows.

  Args:
    count: number of axes.
    width: width of one in inches; two in a row are somewhat narrower.
    height: height of one in inches.
    columns: maximum number in a row.
    **options: arguments of `Figure.subplots`.
  """
  columns = min(columns, count)
  rows = -(-count // columns)
  each = width if columns == 1 else 0.8 * width
  figure = figure_lib.Figure(
    figsize=(columns * each, rows * height), layout='constrained'
  )
  axes = np.ravel(figure.subplots(rows, columns, squeeze=False, **options))
  for unused in axes[count:]:
    unused.set_axis_off()
  return figure, list(axes[:count])


def legend(
  figure: figure_lib.Figure, axes: Sequence[Any], columns: int = 3
) -> None:
  """Puts one legend below all axes."""
  entries: dict[str, Any] = {}
  for one in axes:
    for handle, label in zip(*one.get_legend_handles_labels(), strict=True):
      entries.setdefault(label, handle)
  if entries:
    # The approximate width of an entry in inches.
    each = 0.7 + 0.08 * max(map(len, entries))
    columns = min(columns, max(1, int(figure.get_figwidth() / each)))
    figure.legend(
      list(entries.values()),
      list(entries),
      loc='outside lower center',
      ncols=min(columns, len(entries)),
      handlelength=3.2,
    )


def legends(
  figure: figure_lib.Figure, axes: Sequence[Any], is_split: bool
) -> None:
  """Puts one legend below all axes, or one below each.

  Args:
    figure: the figure.
    axes: its axes.
    is_split: whether one style has another meaning in each of them.
  """
  if not is_split:
    legend(figure, axes)
    return
  for one in axes:
    one.tick_params(labelbottom=True)  # Shared axes have them below only.
    handles, labels = one.get_legend_handles_labels()
    one.legend(
      handles,
      labels,
      loc='upper center',
      bbox_to_anchor=(0.5, -0.24),
      ncols=2,
      handlelength=3.2,
      fontsize=10,
    )


def label_left(axes: Sequence[Any], label: str, columns: int = 2) -> None:
  """Labels the y-axis of the first panel of each row."""
  for one in axes[::columns]:
    one.set_ylabel(label)


def heatmap(
  axes: Any,
  values: np.ndarray,
  rows: Sequence[str],
  columns: Sequence[str],
  most: int = 12,
) -> None:
  """Draws a matrix of percentages with the numbers in its cells.

  Args:
    axes: the axes to draw on.
    values: [rows, columns]; NaN is unknown.
    rows: names of the rows.
    columns: names of the columns.
    most: numbers are left out for more rows or columns than this.
  """
  axes.imshow(values, vmin=0, vmax=100, cmap='Blues', aspect='auto')
  axes.grid(visible=False)
  small = 11 if len(columns) <= 8 else 8.5
  axes.set_xticks(
    range(len(columns)), columns, rotation=40, ha='right',
    rotation_mode='anchor', fontsize=small,
  )  # fmt: skip
  axes.set_yticks(range(len(rows)), rows, fontsize=small)
  if max(values.shape) > most:
    return
  for i, row in enumerate(values):
    for j, value in enumerate(row):
      known = not np.isnan(value)
      axes.text(
        j, i, f'{value:.0f}' if known else '–', ha='center', va='center',
        fontsize=small + 1,
        color='white' if known and value > 55 else 'black',
      )  # fmt: skip


def finished(
  figure: figure_lib.Figure, name: str, title: str, caption: str
) -> Figure:
  """Returns the figure with its files; equal figures give equal bytes."""
  files = {}
  for kind, metadata in (
    ('png', {'Software': None}),
    ('svg', {'Date': None, 'Creator': None}),
  ):
    file = io.BytesIO()
    figure.savefig(file, format=kind, metadata=metadata)
    files[kind] = file.getvalue()
  width = float(figure.get_figwidth())
  return Figure(name, title, caption, width, files['png'], files['svg'])
