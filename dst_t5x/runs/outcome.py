"""What a finished run leaves beside its checkpoints: a file to store and send.

A subset of the seed's parameters becomes `last.dst`, an adapter becomes
`last_adapter/`, in Hugging Face PEFT's format; the checkpoint that counts (see
`best`), or else the last, `best.dst` or `best_adapter/`. Full fine-tuning
leaves nothing, nor does an adapter that PEFT has not: their checkpoint is it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from absl import logging
from etils import epath
import jax
import numpy as np

from dst_t5x import subsets
from dst_t5x.adapters import api as adapters
from dst_t5x.checkpoints import peft_files
from dst_t5x.core import json_text
from dst_t5x.core import parts
from dst_t5x.core import stacking
from dst_t5x.core import whole_files
from dst_t5x.engine import budget as budget_lib

PyTree = Any

LAST, BEST = 'last', 'best'
_REPORT_FILE = 'report.json'


def subset_file(folder: epath.Path, name: str = LAST) -> epath.Path:
  """Returns where a run's subset is."""
  return epath.Path(folder) / f'{name}.dst'


def write_subset(
  folder: epath.Path,
  names: Sequence[str],
  found: subsets.Subset,
  about: Mapping[str, Any],
) -> int:
  """Writes a subset; returns the file's bytes.

  Args:
    folder: MODEL_DIR.
    names: LAST, BEST, or both.
    found: what differs from the seed.
    about: the metadata of docs/subset_format.md.

  Raises:
    UserError: it cannot be written.
  """
  for name in names:
    path = subset_file(folder, name)
    size = subsets.save(path, found, about)
    logging.info('subset: %d parameters, %d bytes, %s', found.size, size, path)
  if not found.size:
    logging.warning('the subset is empty: the run left the seed as it was')
  return size


def write_adapter(
  folder: epath.Path,
  names: Sequence[str],
  adapter: adapters.Adapter,
  trained: PyTree,
  base: PyTree,
  about: Mapping[str, Any],
) -> int:
  """Writes an adapter; returns the bytes of its tensors' file.

  Args:
    folder: MODEL_DIR.
    names: LAST, BEST, or both.
    adapter: whose they are.
    trained: its parameters, stacked or not.
    base: shapes of the seed's parameters, stacked or not.
    about: `seed` and `step`.

  Raises:
    UserError: it cannot be written.
  """
  added = stacking.unstack_layers(jax.tree.map(np.asarray, trained))
  for name in names:
    path = folder / f'{name}_adapter'
    peft_files.save(
      path,
      adapter,
      parts.flatten(added),
      jax.eval_shape(stacking.unstack_layers, base),
      about['seed'],
      about['step'],
      replace=True,
    )
    logging.info('adapter: %s', path)
  return (path / peft_files.WEIGHTS_FILE).stat().length


def write_report(
  folder: epath.Path,
  step: int,
  budget: budget_lib.Budget,
  file_bytes: int | None,
  results: Mapping[str, float],
  free: int | None = None,
) -> None:
  """Writes what was trained, how much of it, on what, and the last scores.

  Args:
    folder: MODEL_DIR.
    step: steps that are done.
    budget: what the method may train.
    file_bytes: of the file that the run leaves, None if it leaves none.
    results: of the last evaluation.
    free: how many parameters differ from the seed, where a subset is what is
      trained; may be fewer than the budget.
  """
  free = budget.free if free is None else free
  report = {
    'step': step,
    'parameters': budget.parameters,
    'free': free,
    'fraction': free / budget.parameters,
    'budget': budget.free,
    'file_bytes_predicted': budget.file_bytes,
    'file_bytes': file_bytes,
    'devices': _devices(),
    'results': dict(results),
  }
  text = json_text.dumps(report, indent=2) + '\n'
  whole_files.write_text(folder / _REPORT_FILE, text)


def _devices() -> str:
  """Returns what this process trains on: `8 × TPU v4`."""
  return f'{jax.device_count()} × {jax.devices()[0].device_kind}'
