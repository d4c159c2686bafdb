"""Tables, written as Markdown and HTML for readers and as CSV for programs."""

from collections.abc import Sequence
import csv
import dataclasses
import io
import math
import re

import tabulate

from dst_t5x.analysis import cells

NOTHING = '–'

Value = str | float | cells.Score | None


@dataclasses.dataclass(frozen=True)
class Table:
  """A table of the report.

  Attributes:
    name: the name of its files.
    title: the title.
    header: names of the columns.
    rows: a value for each column; None for an empty cell.
    notes: notes for the reader.
    is_long: whether the page shows only the beginning.
  """

  name: str
  title: str
  header: Sequence[str]
  rows: Sequence[Sequence[Value]]
  notes: Sequence[str] = ()
  is_long: bool = False

  def markdown(self) -> str:
    """Returns title, table and notes."""
    rows = [[text(v).replace('|', '\\|') for v in row] for row in self.rows]
    table = tabulate.tabulate(
      rows,
      headers=list(self.header),
      tablefmt='github',
      disable_numparse=True,
      colalign=self._alignment(),
    )
    notes = ''.join(f'\n{note}\n' for note in self.notes)
    return f'## {self.title}\n\n{table}\n{notes}'

  def html(self, most: int | None = None) -> str:
    """Returns the table alone; only the first rows if it is long."""
    return tabulate.tabulate(
      [[text(value) for value in row] for row in self.rows[:most]],
      headers=list(self.header),
      tablefmt='html',
      disable_numparse=True,
      colalign=self._alignment() if self.rows else None,
    )

  def csv(self) -> str:
    """Returns the values in full precision; a score takes three columns."""
    scored = [
      any(isinstance(row[i], cells.Score) for row in self.rows)
      for i in range(len(self.header))
    ]
    names: list[str] = []
    for name, is_score in zip(self.header, scored, strict=True):
      more = [f'{name} spread', f'{name} runs'] if is_score else []
      names += [name, *more]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator='\n')
    writer.writerow(names)
    for row in self.rows:
      fields: list[str] = []
      for value, is_score in zip(row, scored, strict=True):
        fields += _fields(value) if is_score else [_exact(value)]
      writer.writerow(fields)
    return file.getvalue()

  def _alignment(self) -> list[str]:
    """Returns the alignment of the columns; numbers are on the right."""
    columns = [[row[i] for row in self.rows] for i in range(len(self.header))]
    return [
      'right'
      if any(isinstance(v, int | float | cells.Score) for v in column)
      else 'left'
      for column in columns
    ]


def file_name(name: str) -> str:
  """Returns the file name of a figure or table."""
  return re.sub(r'[^\w.+=-]+', '-', name).strip('-')


def text(value: Value) -> str:
  """Returns a value as a text for readers."""
  if value is None or value == '':
    return NOTHING
  if isinstance(value, float):
    return NOTHING if math.isnan(value) else f'{value:.4g}'
  if isinstance(value, int):
    return f'{value:,}'
  return str(value) or NOTHING


def _fields(value: Value) -> list[str]:
  """Returns mean, spread and number of a score; or the value and ''."""
  if not isinstance(value, cells.Score):
    return [_exact(value), '', '']
  if not value.values:
    return ['', '', '0']
  return [_exact(value.mean), _exact(value.spread), str(len(value.values))]


def _exact(value: Value) -> str:
  if value is None or (isinstance(value, float) and math.isnan(value)):
    return ''
  return repr(value) if isinstance(value, float) else str(value)
