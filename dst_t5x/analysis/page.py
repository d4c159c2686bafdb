"""One self-contained HTML page with all figures and tables."""

import base64
from collections.abc import Sequence
import html

from dst_t5x.analysis import style
from dst_t5x.analysis import tables

_PIXELS = 80  # Pixels for an inch of a figure, if the page is wide enough.
_ROWS = 40  # Rows shown of long tables; their files have all rows.
_CSS = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; margin: 2em auto;
  max-width: 62em; padding: 0 1em; }
h1 { font-size: 1.6em; } h2 { font-size: 1.25em; margin-top: 2.2em; }
figure { margin: 1em 0; } figure img { max-width: 100%; height: auto; }
figcaption, .note { color: #555; font-size: 0.9em; max-width: 50em; }
table { border-collapse: collapse; font-size: 0.85em; margin: 0.8em 0;
  font-variant-numeric: tabular-nums; display: block; overflow-x: auto; }
th, td { border-bottom: 1px solid #ddd; padding: 0.25em 0.7em;
  white-space: nowrap; }
th { border-bottom: 2px solid #888; text-align: left; }
nav a { margin-right: 1em; } .problems { border-left: 4px solid #b00;
  padding-left: 1em; }
"""


def make(
  title: str,
  summary: Sequence[str],
  problems: Sequence[str],
  figures: Sequence[style.Figure],
  all_tables: Sequence[tables.Table],
) -> str:
  """Returns the page as HTML.

  Args:
    title: the page's title.
    summary: paragraphs about the runs that were read.
    problems: a line for each thing that could not be read.
    figures: the figures, in order.
    all_tables: the tables, in order.
  """
  parts = [_paragraph(text) for text in summary]
  if problems:
    items = ''.join(f'<li>{html.escape(line)}</li>\n' for line in problems)
    parts.append(
      f'<div class="problems"><h2>Not read</h2>\n<ul>{items}</ul></div>'
    )
  parts.append(_contents(figures, all_tables))
  parts += [_figure(figure) for figure in figures]
  parts += [_table(table) for table in all_tables]
  body = '\n'.join(parts)
  return (
    '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    f'<title>{html.escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n'
    f'<body>\n<h1>{html.escape(title)}</h1>\n{body}\n</body>\n</html>\n'
  )


def _paragraph(text: str) -> str:
  return f'<p>{html.escape(text)}</p>'


def _contents(
  figures: Sequence[style.Figure], all_tables: Sequence[tables.Table]
) -> str:
  titles = {figure.name: figure.title for figure in figures}
  titles |= {table.name: table.title for table in all_tables}
  links = ''.join(
    f'<li><a href="#{html.escape(name)}">{html.escape(title)}</a></li>\n'
    for name, title in titles.items()
  )
  return f'<nav><ul>{links}</ul></nav>'


def _figure(figure: style.Figure) -> str:
  data = base64.b64encode(figure.png).decode()
  return (
    f'<h2 id="{html.escape(figure.name)}">{html.escape(figure.title)}</h2>\n'
    f'<figure><img alt="{html.escape(figure.title)}" '
    f'width="{round(_PIXELS * figure.width)}" '
    f'src="data:image/png;base64,{data}">\n'
    f'<figcaption>{html.escape(figure.caption)}</figcaption></figure>'
  )


def _table(table: tables.Table) -> str:
  notes = list(table.notes)
  shown = _ROWS if table.is_long else None
  if shown and len(table.rows) > shown:
    notes.append(
      f'The first {shown} of {len(table.rows):,} rows; '
      f'tables/{tables.file_name(table.name)}.csv has all.'
    )
  said = '\n'.join(f'<p class="note">{html.escape(note)}</p>' for note in notes)
  return (
    f'<h2 id="{html.escape(table.name)}">{html.escape(table.title)}</h2>\n'
    f'{table.html(shown)}\n{said}'
  )
