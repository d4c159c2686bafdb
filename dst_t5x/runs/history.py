"""The subsets of a run's checkpoints: `MODEL_DIR/subsets/STEP.dst`.

A checkpoint brings the subset to the host. The subset is then also written to a
file, which outlives the checkpoint, and compared with the first and the last
saved subsets. This costs nothing between checkpoints. The results do not depend
on the number of devices, or on how often a run is resumed.
"""

from collections.abc import Mapping
import os
from typing import Any, NamedTuple

from etils import epath
import jax.numpy as jnp
import numpy as np

from dst_t5x import subsets as subset_lib
from dst_t5x.core import object_stores
from dst_t5x.core.errors import UserError
from dst_t5x.method import distances
from dst_t5x.subsets import fingerprint

PyTree = Any

FOLDER = 'subsets'
_BINS_PER_DECADE = 4


class Report(NamedTuple):
  """The report on a saved subset.

  Attributes:
    overlaps: `overlap/first` and `overlap/last_saved`, the share of the first
      and of the last saved subset that is still free (Eq. 9).
    distances: the `histogram` of the free components' distances from the seed.
  """

  overlaps: dict[str, float]
  distances: np.ndarray


class History:
  """The saved subsets of a run."""

  def __init__(self, folder: str | os.PathLike[str], keep: bool) -> None:
    """Starts without subsets; see `resume`.

    Args:
      folder: MODEL_DIR.
      keep: whether to write a file for each subset.
    """
    self._folder = epath.Path(folder) / FOLDER
    self._keep = keep
    self._first: subset_lib.Subset | None = None
    self._last: subset_lib.Subset | None = None

  def resume(self, step: int, subset: subset_lib.Subset) -> None:
    """Continues from a checkpoint.

    Args:
      step: the checkpoint's step. Files of later steps will be rewritten.
      subset: the checkpoint's subset.
    """
    self._last = subset
    before = [path for at, path in files(self._folder.parent) if at <= step]
    try:
      self._first = subset_lib.load(before[0])[0] if before else None
    except UserError:  # Needed for one report only, so no reason to fail.
      self._first = None

  def add(
    self, step: int, subset: subset_lib.Subset, about: Mapping[str, Any]
  ) -> dict[str, float]:
    """Adds the subset of a checkpoint; returns its overlaps.

    Args:
      step: the checkpoint's step.
      subset: the checkpoint's subset.
      about: the metadata of docs/subset_format.md.

    Raises:
      UserError: the subset's file cannot be written.
    """
    if self._keep:
      object_stores.make_folder(self._folder)
      subset_lib.save(self._folder / f'{step:06}.dst', subset, about)
    is_first = self._last is None
    overlaps = {
      f'overlap/{name}': subset_lib.overlap(before, subset).share
      for name, before in (('first', self._first), ('last_saved', self._last))
      if before is not None
    }
    self._first = subset if is_first else self._first
    self._last = subset
    return overlaps


def files(folder: str | os.PathLike[str]) -> list[tuple[int, epath.Path]]:
  """Returns (step, file) of all saved subsets of a run, in order.

  Args:
    folder: MODEL_DIR.
  """
  found = (epath.Path(folder) / FOLDER).glob('*.dst')
  return sorted((int(p.stem), p) for p in found if p.stem.isdigit())


def distances_from_seed(
  subset: subset_lib.Subset, seed: PyTree, distance: str
) -> np.ndarray:
  """Returns each free component's distance from the seed, float32 [size].

  Args:
    subset: the subset.
    seed: θ⁰ on the host, stacked or not.
    distance: a name in `distances.DISTANCES` (Table 1), without normalization.
      Any other name stands for the absolute difference.
  """
  tensors = dict(fingerprint.tensors(seed))
  nothing = [np.zeros(0, np.float32)]
  old = np.concatenate(
    nothing + [tensors[p].reshape(-1)[i] for p, i in subset.positions.items()],
    dtype=np.float32,
  )
  new = np.concatenate(
    nothing + [subset.values[path] for path in subset.positions],
    dtype=np.float32,
  )
  # One call for all tensors, because JAX compiles for each shape.
  measure = distances.DISTANCES.get(distance, distances.absolute)
  return np.asarray(measure(jnp.asarray(new), jnp.asarray(old)))


def histogram(values: np.ndarray) -> np.ndarray:
  """Returns a histogram of logarithms to base 10.

  Args:
    values: [n], not negative. Zeros and values that are not finite are left
      out.

  Returns:
    float64 [bins, 3]: lower edge, upper edge and count, four bins per decade.
  """
  logs = np.log10(values[(values > 0) & np.isfinite(values)], dtype=np.float64)
  if not len(logs):
    return np.zeros((0, 3))
  bins = np.floor(logs * _BINS_PER_DECADE).astype(int)
  counts = np.bincount(bins - bins.min())
  lower = (bins.min() + np.arange(len(counts))) / _BINS_PER_DECADE
  return np.stack([lower, lower + 1 / _BINS_PER_DECADE, counts], axis=1)
