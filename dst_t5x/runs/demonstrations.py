"""What demonstrations share: they run the commands, and tabulate the runs."""

from collections.abc import Callable, Mapping, Sequence
import json
import pathlib
import sys
from typing import Any

import numpy as np

from dst_t5x.config import binaries
from dst_t5x.core import metrics_file
from dst_t5x.runs import artifacts
from dst_t5x.runs import evaluating


def call(binary: Callable[..., Any], *arguments: str) -> Any:
  """Runs a command with its arguments in this process, and prints it."""
  shown = ' '.join(arguments)
  print(f'\n$ python -m {binary.__module__} {shown}', file=sys.stderr)
  return binaries.parse(arguments, binary)()


def evaluate_once(folder: pathlib.Path, *arguments: str) -> dict[str, float]:
  """Evaluates a checkpoint, unless the folder has the results."""
  done = folder / 'results.json'
  if not done.exists():
    call(evaluating.evaluate, *arguments, f"--gin.EVAL_OUTPUT_DIR='{folder}'")
  return json.loads(done.read_text())


def facts(folder: pathlib.Path) -> dict[str, Any]:
  """Returns a finished run's free parameters, bytes and seconds a step."""
  report = artifacts.read_report(folder)
  rates = metrics_file.rates(metrics_file.read(folder))
  return {
    'free_parameters': report['free'],
    'parameters': report['parameters'],
    # A run of all parameters leaves its checkpoint only.
    'bytes': report['file_bytes'] or 4 * report['parameters'],
    # The first report includes the compilation.
    'seconds_per_step': float(1 / np.median(rates[1:] or rates)),
    'folder': str(folder),
  }


def zero_shot_row(
  like: Mapping[str, Any], folder: pathlib.Path, **values: Any
) -> dict[str, Any]:
  """Returns the seed's row of a table.

  Args:
    like: a run's row; what the seed has not of it is None.
    folder: of the seed's evaluation.
    **values: of the row.
  """
  return dict.fromkeys(like) | {
    'name': 'zero-shot',
    'method': 'zero-shot',
    'free_parameters': 0,
    'share': 0.0,
    'parameters': like['parameters'],
    'bytes': 0,
    'folder': str(folder),
    **values,
  }


def table(
  rows: Sequence[dict[str, Any]], columns: Sequence[tuple[str, str, str]]
) -> str:
  """Returns rows as a table for a terminal.

  Args:
    rows: name of a value -> value; None is shown as a dash.
    columns: the title of each column, the name of its value, its format.
  """
  cells = [[title for title, _, _ in columns]]
  for row in rows:
    cells.append(
      [
        '-' if row[name] is None else format(row[name], how)
        for _, name, how in columns
      ]
    )
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  return '\n'.join(
    '  '.join(
      [line[0].ljust(widths[0])]
      + [x.rjust(n) for x, n in zip(line[1:], widths[1:], strict=True)]
    )
    for line in cells
  )
