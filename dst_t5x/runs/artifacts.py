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
from dst_t5x.runs import extraction as extraction_lib

PyTree = Any

LAST, BEST = 'last', 'best'
_REPORT_FILE = 'report.json'


def subset_file(folder: epath.Path, name: str = LAST) -> epath.Path:
  """Returns where a run's subset is."""
  return epath.Path(folder) / f'{name}.dst'


class Artifacts:
  """Writes what a run leaves, if it leaves anything."""

  def __init__(
    self,
    folder: epath.Path,
    adapter: adapters.Adapter,
    base: PyTree,
    extraction: extraction_lib.Extraction | None,
    replicated: jax.sharding.Sharding,
  ) -> None:
    """Writes nothing yet.

    Args:
      folder: MODEL_DIR.
      adapter: the network's.
      base: shapes of the seed's parameters, stacked or not.
      extraction: from the seed, where a subset of it is left.
      replicated: the sharding of what all devices have whole.
    """
    self._folder = folder
    self._adapter = adapter
    self._base = base
    self._extraction = extraction
    self._replicated = replicated

  def gather(self, trained: PyTree) -> Any:
    """Returns what is to be left of parameters, whole in each process.

    Args:
      trained: what is trained, on the devices.

    Returns:
      A subset, or an adapter's parameters; None if nothing is left.
    """
    if peft_files.is_known(self._adapter):
      gather = jax.jit(lambda tree: tree, out_shardings=self._replicated)
      return jax.tree.map(np.asarray, gather(trained))
    return self._extraction and self._extraction.extract(trained)

  def on_host(self, trained: PyTree) -> Any:
    """Returns the same of parameters that this process has whole."""
    if self._extraction is None:
      return trained
    return self._extraction.extract_on_host(trained)

  def write(
    self, names: Sequence[str], left: Any, about: Mapping[str, Any]
  ) -> int | None:
    """Writes what `gather` or `on_host` returned.

    Args:
      names: LAST, BEST, or both.
      left: a subset, or an adapter's parameters.
      about: the metadata of docs/subset_format.md.

    Returns:
      The bytes of the file, of an adapter's tensors; None if there is none.

    Raises:
      UserError: it cannot be written.
    """
    if peft_files.is_known(self._adapter):
      return self._write_adapter(names, left, about)
    if self._extraction is not None:
      return self._write_subset(names, left, about)
    return None

  def _write_subset(
    self, names: Sequence[str], subset: subsets.Subset, about: Mapping[str, Any]
  ) -> int:
    for name in names:
      path = subset_file(self._folder, name)
      size = subsets.save(path, subset, about)
      logging.info(
        'subset: %d parameters, %d bytes, %s', subset.size, size, path
      )
    if not subset.size:
      logging.warning('the subset is empty: the run left the seed as it was')
    return size

  def _write_adapter(
    self, names: Sequence[str], trained: PyTree, about: Mapping[str, Any]
  ) -> int:
    added = stacking.unstack_layers(jax.tree.map(np.asarray, trained))
    for name in names:
      path = self._folder / f'{name}_adapter'
      peft_files.save(
        path,
        self._adapter,
        parts.flatten(added),
        jax.eval_shape(stacking.unstack_layers, self._base),
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
