"""The numbers of a run as JSON lines for scripts: `MODEL_DIR/metrics.jsonl`."""

from collections.abc import Iterable, Mapping
import json
import math
import os

from absl import logging
from etils import epath

from dst_t5x.core import json_text
from dst_t5x.core import object_stores
from dst_t5x.core import whole_files

METRICS_FILE = 'metrics.jsonl'
RATE = 'speed/steps_per_second'
_NO_MODULES = ('total', 'churn', 'fraction', 'file_bytes')


def read(folder: str | os.PathLike[str]) -> list[dict[str, float]]:
  """Returns the rows of a run, each with its `step`.

  A torn last line is left out; a run that wrote none has no rows.
  """
  path = epath.Path(folder) / METRICS_FILE
  if not path.exists():
    return []
  rows = []
  for line in path.read_text().splitlines():
    try:
      row = json.loads(line)
    except ValueError:
      logging.warning('%s: left out a torn line', path)
      continue
    # As which NaN is written.
    rows.append({k: math.nan if v is None else v for k, v in row.items()})
  return rows


def rates(rows: Iterable[Mapping[str, float]]) -> list[float]:
  """Returns steps per second, report by report; the first has compilation."""
  return [row[RATE] for row in rows if RATE in row]


def modules(rows: Iterable[Mapping[str, float]]) -> dict[str, float]:
  """Returns module -> free parameters of the last report that has them."""
  found: dict[str, float] = {}
  for row in rows:
    of_row = {
      name.removeprefix('free/'): value
      for name, value in row.items()
      if name.startswith('free/')
      and name.removeprefix('free/') not in _NO_MODULES
    }
    found = of_row or found
  return found


def drop_after(folder: str | os.PathLike[str], step: int) -> None:
  """Drops what an interrupted run wrote beyond the step it is resumed from."""
  rows = [row for row in read(folder) if row['step'] <= step]
  path = epath.Path(folder) / METRICS_FILE
  object_stores.make_folder(path.parent)
  text = ''.join(json_text.dumps(row) + '\n' for row in rows)
  whole_files.write_text(path, text)


def append(
  folder: str | os.PathLike[str], step: int, values: Mapping[str, float]
) -> None:
  """Adds a row."""
  path = epath.Path(folder) / METRICS_FILE
  row = json_text.dumps({'step': step} | dict(values)) + '\n'
  if object_stores.is_remote(path):  # Nothing is added to a file there.
    before = path.read_text() if path.exists() else ''
    whole_files.write_text(path, before + row)
    return
  with path.open('a') as f:
    f.write(row)
