"""The artifacts of a finished run: small files to store and share.

A run that tunes a subset of the seed's parameters writes `last.dst`. A run with
an adapter writes `last_adapter/`, in the format of Hugging Face PEFT. The best
checkpoint (see `best`), or else the last, becomes `best.dst` or
`best_adapter/`. Full fine-tuning, and adapters that PEFT does not have, leave
only their checkpoints.
"""

from collections.abc import Mapping, Sequence
import json
import pathlib
from typing import Any

from absl import logging
from etils import epath
import jax
import numpy as np

from dst_t5x import subsets
from dst_t5x.adapters import api as adapters
from dst_t5x.checkpoints import peft_files
from dst_t5x.checkpoints import peft_folder
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
  """Returns the path of a run's subset file."""
  return epath.Path(folder) / f'{name}.dst'


class Artifacts:
  """Writes the artifacts of a run, if it has any."""

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
      adapter: the network's adapter.
      base: the shapes of the seed's parameters, stacked or not.
      extraction: compares parameters with the seed; None if the artifact is not
        a subset.
      replicated: the replicated sharding.
    """
    self._folder = folder
    self._adapter = adapter
    self._base = base
    self._extraction = extraction
    self._replicated = replicated

  def gather(self, trained: PyTree, frozen: PyTree) -> Any:
    """Returns the content of an artifact, complete in each process.

    Args:
      trained: the trained parameters, on the devices.
      frozen: the others.

    Returns:
      A subset, or an adapter's parameters and fixed tensors; None if there is
      no artifact.
    """
    if peft_files.is_known(self._adapter):
      left = parts.join(trained, self._fixed(frozen))
      gather = jax.jit(lambda tree: tree, out_shardings=self._replicated)
      return jax.tree.map(np.asarray, gather(left))
    return self._extraction and self._extraction.extract(trained)

  def _fixed(self, params: PyTree) -> PyTree:
    pattern = self._adapter.fixed
    return parts.split(params, [pattern])[0] if pattern else {}

  def on_host(self, trained: PyTree, last: Any) -> Any:
    """Returns the same as `gather`, from parameters on this host.

    Args:
      trained: the trained parameters.
      last: what `gather` returned, of which the fixed tensors are taken.
    """
    if peft_files.is_known(self._adapter):
      return parts.join(trained, self._fixed(last))
    if self._extraction is None:
      return trained
    return self._extraction.extract_on_host(trained)

  def write(
    self, names: Sequence[str], left: Any, about: Mapping[str, Any]
  ) -> int | None:
    """Writes an artifact under each name.

    Args:
      names: LAST, BEST, or both.
      left: the content, as `gather` or `on_host` returned it.
      about: the metadata of docs/subset_format.md.

    Returns:
      The size in bytes of the subset file, or of the adapter's weights file;
      None if there is no artifact.

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
    return (path / peft_folder.WEIGHTS_FILE).stat().length


def write_report(
  folder: epath.Path,
  step: int,
  budget: budget_lib.Budget,
  file_bytes: int | None,
  results: Mapping[str, float],
  free: int | None = None,
) -> None:
  """Writes `report.json`: the budget, the devices and the last scores.

  Args:
    folder: MODEL_DIR.
    step: the number of completed steps.
    budget: the method's budget.
    file_bytes: the size of the run's artifact; None if it has none.
    results: the metrics of the last evaluation.
    free: how many parameters differ from the seed, for a subset method; can be
      fewer than the budget.
  """
  free = budget.free if free is None else free
  report = {
    'step': step,
    'parameters': budget.parameters,
    'free': free,
    'fraction': free / budget.parameters,
    'budget': budget.free,
    'free_at_most': budget.free_at_most,
    'file_bytes_predicted': budget.file_bytes,
    'file_bytes': file_bytes,
    'devices': _devices(),
    'results': dict(results),
  }
  text = json_text.dumps(report, indent=2) + '\n'
  whole_files.write_text(folder / _REPORT_FILE, text)


def _devices() -> str:
  """Returns number and kind of all devices: `8 × TPU v4`."""
  return f'{jax.device_count()} × {jax.devices()[0].device_kind}'


def read_report(folder: pathlib.Path) -> dict[str, Any]:
  """Returns the content of a finished run's `report.json`.

  Raises:
    OSError: the run has not finished, or the folder is no run's.
  """
  content: dict[str, Any] = json.loads((folder / _REPORT_FILE).read_text())
  return content
