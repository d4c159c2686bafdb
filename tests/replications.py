"""Counts XLA's warnings that it replicates an array on all devices of a mesh.

  python tests/replications.py MODEL TOPOLOGY [METHOD]

A row of JSON for each program of `programs.ALL`, with two layers. A process of
its own: it has as many devices as the topology, and XLA has to write warnings.
"""

import json
import os
import sys

# Before JAX is imported. What is not compiled is not warned of, either.
os.environ['TF_CPP_MIN_LOG_LEVEL'] = '1'
os.environ['JAX_ENABLE_COMPILATION_CACHE'] = 'false'

from dst_t5x.planning import programs
from dst_t5x.planning import topologies
from dst_t5x.planning import traffic


def main(model: str, topology: str, method: str = 'full') -> None:
  """Prints the rows."""
  parsed = topologies.parse(topology)
  traffic.prepare(parsed)
  found = traffic.lower(
    model, parsed, method=method, names=programs.ALL, layers=2
  )
  for name, program in found.items():
    with traffic.warnings() as warnings:
      program.lowered.compile()
    row = {'program': name, 'mesh': str(program.partitioner)}
    print(json.dumps({**row, 'warnings': len(warnings)}), flush=True)


if __name__ == '__main__':
  main(*sys.argv[1:])
