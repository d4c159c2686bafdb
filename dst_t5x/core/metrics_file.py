"""`MODEL_DIR/metrics.jsonl`: the metrics of a run, one JSON object a line."""

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
# Of text on which nothing is trained; see `engine.held_out`.
HELD_OUT = 'held_out'
FORGETTING = f'{HELD_OUT}/forgetting'
_NO_MODULES = ('total', 'churn', 'fraction', 'file_bytes')


def read(folder: str | os.PathLike[str]) -> list[dict[str, float]]:
  """Returns the rows of a run, each with its `step`.

  Lines that are not complete are skipped. A missing file has no rows.
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
    # `null` stands for NaN.
    rows.append({k: math.nan if v is None else v for k, v in row.items()})
  return rows


def rates(rows: Iterable[Mapping[str, float]]) -> list[float]:
  """Returns the steps per second of each report; the first has compilation."""
  return [row[RATE] for row in rows if RATE in row]


def modules(rows: Iterable[Mapping[str, float]]) -> dict[str, float]:
  """Returns module -> free parameters, from the last report that has them."""
  free: dict[str, float] = {}
  for row in rows:
    of_row = {
      name.removeprefix('free/'): value
      for name, value in row.items()
      if name.startswith('free/')
      and name.removeprefix('free/') not in _NO_MODULES
    }
    free = of_row or free
  return free


def drop_after(folder: str | os.PathLike[str], step: int) -> None:
  """Drops the rows after a step: a run that resumes there writes them again."""
  rows = [row for row in read(folder) if row['step'] <= step]
  path = epath.Path(folder) / METRICS_FILE
  object_stores.make_folder(path.parent)
  text = ''.join(json_text.dumps(row) + '\n' for row in rows)
  whole_files.write_text(path, text)


def append(
  folder: str | os.PathLike[str], step: int, values: Mapping[str, float]
) -> None:
  """Appends a row."""
  path = epath.Path(folder) / METRICS_FILE
  row = json_text.dumps({'step': step} | dict(values)) + '\n'
  if object_stores.is_remote(path):  # Stores cannot append to a file.
    before = path.read_text() if path.exists() else ''
    whole_files.write_text(path, before + row)
    return
  with path.open('a') as f:
    f.write(row)
