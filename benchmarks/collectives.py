"""What a training step sends between devices, and the least that it could.

  python benchmarks/collectives.py t5_1_1_xxl v4:4x4x4
  python benchmarks/collectives.py t5_1_1_xxl v4:4x4x4 --replicated

The first compiles the step of a model of `gin/models` for the devices, with the
lengths of GSM8K, and lists what each sends by collective and by cause. Further
flags are those of training: --gin.BATCH_SIZE=64. Nothing is allocated.

The second counts XLA's warnings that a program replicates an array on all
devices: of training, evaluation and decoding, with two layers. Each should be
0.
"""

import argparse
import os
from typing import Any

# Before JAX is imported: XLA must write its warnings, and what comes from a
# cache has none.
os.environ['TF_CPP_MIN_LOG_LEVEL'] = '1'
os.environ['JAX_ENABLE_COMPILATION_CACHE'] = 'false'

import tables

from dst_t5x.config import binaries
from dst_t5x.planning import programs
from dst_t5x.planning import topologies
from dst_t5x.planning import traffic

_LAYERS = 2
# Rows that send less than this share are not printed.
_SMALL = 0.005


def _show_sent(program: programs.Program) -> list[tables.Row]:
  """Compiles a step, prints what it sends and the least; returns the rows."""
  with traffic.warnings() as warnings:
    text = program.lowered.compile().as_text() or ''
  found = traffic.rows(text)
  total = sum(row.bytes for row in found)
  as_is = sum(row.bytes_as_is for row in found)
  print(f'{program.partitioner}, {program.rows} rows: GB that a device sends')
  shown = [row for row in found if row.bytes > _SMALL * total]
  tables.show(
    [
      {'collective': row.collective, 'cause': row.cause}
      | {'GB': row.bytes / 1e9, 'as is': row.bytes_as_is / 1e9}
      for row in shown
    ],
    ('collective', 'cause', 'GB', 'as is'),
  )
  causes = traffic.least(program)
  least = sum(causes.values())
  print(f'all: {total / 1e9:.2f}; as is {as_is / 1e9:.2f}')
  parts = (f'{name} {size / 1e9:.2f}' for name, size in causes.items())
  print(f'the least: {least / 1e9:.2f} ({", ".join(parts)})')
  print(f'ratio: {total / least:.2f}; as is {as_is / least:.2f}')
  print(f'arrays that are replicated: {len(warnings)}')
  return [row._asdict() for row in found]


def _count(found: dict[str, programs.Program]) -> list[tables.Row]:
  """Compiles programs, and prints the warnings of each; returns the rows."""
  rows = []
  for name, program in found.items():
    with traffic.warnings() as warnings:
      program.lowered.compile()
    row: dict[str, Any] = {'program': name, 'mesh': str(program.partitioner)}
    rows.append({**row, 'replicated': len(warnings)})
  tables.show(rows, ('program', 'mesh', 'replicated'))
  return rows


def _run() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('model', help='of gin/models, such as llama3_1_8b')
  parser.add_argument('topology', help='such as v4:4x4x4 or h200:8')
  parser.add_argument('--method', default='full', help='of gin/methods')
  parser.add_argument('--replicated', action='store_true')
  parser.add_argument('--json', metavar='FILE', help='write the rows here')
  options, flags = parser.parse_known_args()
  topology = topologies.parse(options.topology)
  traffic.prepare(topology)
  what = options.model, topology, options.method, flags
  if options.replicated:
    rows = _count(traffic.lower(*what, programs.ALL, _LAYERS))
  else:
    [program] = traffic.lower(*what).values()
    rows = _show_sent(program)
  tables.write_json(options.json, rows)


if __name__ == '__main__':
  binaries.perform(_run)
