"""Exact match of each of the task's operations, from what runs wrote.

    python studies/strings/operations.py runs/budgets runs/small runs/large \
      runs/normalization > studies/strings/operations.jsonl

A line for each run: its sweep and name, and operation -> per cent.
"""

from collections import defaultdict
from collections.abc import Iterable
import json
import pathlib
import sys


def of_run(folder: pathlib.Path) -> dict[str, float]:
  """Returns operation -> exact match in per cent, at the last evaluation."""
  files = sorted(folder.glob('evaluation/study_finetune-0*.jsonl'))
  if not files:
    return {}
  right = defaultdict(list)
  for line in files[-1].read_text().splitlines():
    row = json.loads(line)
    operation = row['input']['inputs_pretokenized'].partition(':')[0]
    right[operation].append(row['prediction'] == row['target'])
  return {
    name: round(100 * sum(found) / len(found), 2)
    for name, found in sorted(right.items())
  }


def main(sweeps: Iterable[str]) -> None:
  """Prints the lines of all runs of sweeps."""
  for sweep in map(pathlib.Path, sweeps):
    for folder in sorted(path for path in sweep.iterdir() if path.is_dir()):
      scores = of_run(folder)
      if scores:
        line = {'sweep': sweep.name, 'name': folder.name, 'scores': scores}
        print(json.dumps(line, allow_nan=False, ensure_ascii=False))


if __name__ == '__main__':
  main(sys.argv[1:])
