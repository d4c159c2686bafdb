"""What benchmarks have in common: rows, how they are printed and kept."""

from collections.abc import Callable, Mapping, Sequence
import functools
import pathlib
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

from dst_t5x.core import json_text

Row = dict[str, Any]


def seconds(function: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
  """Returns how long a call took, its arrays included, and its result."""
  start = time.perf_counter()
  result = jax.block_until_ready(function(*arguments))
  return time.perf_counter() - start, result


@functools.cache
def copy_bandwidth() -> float:
  """Returns what a copy on the device reads and writes, in GB/s.

  The copies of 1 GiB (64 MiB on a CPU) are started in a row, so that what it
  takes to start them does not count.
  """
  size = 2**26 if jax.default_backend() == 'cpu' else 2**30
  source = jnp.arange(size // 4, dtype=jnp.uint32)
  copy = jax.jit(jnp.copy)
  in_a_row = 8

  def copies() -> None:
    for _ in range(in_a_row):
      last = copy(source)
    jax.block_until_ready(last)

  copies()
  taken = statistics.median(seconds(copies)[0] for _ in range(5))
  return 2 * in_a_row * size / taken / 1e9


def medians(times: Mapping[Any, Sequence[float]]) -> dict[Any, float]:
  """Returns the median of each series."""
  return {name: statistics.median(series) for name, series in times.items()}


def write_json(path: str | None, rows: Sequence[Row]) -> None:
  """Writes the rows so far, whole or not at all."""
  if path is None:
    return
  part = pathlib.Path(f'{path}.part')
  part.write_text(json_text.dumps(rows, indent=1) + '\n')
  part.replace(path)


def show(rows: Sequence[Row], columns: Sequence[str]) -> None:
  """Prints some columns of rows, aligned."""
  cells = [list(columns)]
  cells += [[_text(row.get(column, '')) for column in columns] for row in rows]
  widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
  for line in cells:
    print('  '.join(f'{c:>{w}}' for c, w in zip(line, widths, strict=True)))


def _text(value: Any) -> str:
  return f'{value:.4g}' if isinstance(value, float) else str(value)
