"""The most memory that a training step or decoding takes, beside PyTorch.

  python benchmarks/peak_memory.py --json peak_memory.json

SmolLM2-135M with random parameters, on a CPU: each in a process of its own,
whose largest resident set is reported. It includes the libraries.
"""

import argparse
import os
import pathlib
import resource
import subprocess
import sys

import decoding
import numpy as np
import tables
import train_step
import works

_EMPTY = 'nothing'


def _one(name: str) -> None:
  """Does the work once, and prints the peak in bytes."""
  work = works.make('smollm2_135m')
  if name.startswith('decode_'):
    engine = decoding.ENGINES[name.removeprefix('decode_')]
    prompts = decoding.random_prompts(8, 128)
    engine(work, works.params(work.network), prompts)(64)
  elif name != _EMPTY:
    batch = work.batch(np.random.default_rng(0))
    method = train_step.only(name, work)
    for _ in range(3):
      method(batch)
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  print(1024 * peak)  # Linux counts in KiB.


def main() -> None:
  """Measures, prints, writes."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--json', metavar='FILE', help='write the rows here')
  parser.add_argument('--one', metavar='NAME', help=argparse.SUPPRESS)
  options = parser.parse_args()
  if options.one:
    return _one(options.one)
  names = [_EMPTY, *train_step.ALONE]
  names += [f'decode_{name}' for name in decoding.ENGINES]
  rows = [{'work': name, 'MiB': _peak(name)} for name in names]
  tables.write_json(options.json, rows)
  tables.show(rows, ('work', 'MiB'))
  return None


def _peak(name: str) -> float:
  done = subprocess.run(
    [sys.executable, pathlib.Path(__file__), '--one', name],
    env=os.environ | {'JAX_PLATFORMS': 'cpu'},
    stdout=subprocess.PIPE,
    text=True,
    check=True,
  )
  return float(done.stdout.splitlines()[-1]) / 2**20


if __name__ == '__main__':
  main()
