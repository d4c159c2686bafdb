"""The subsets of a run's checkpoints: `MODEL_DIR/subsets/STEP.dst`.

When a checkpoint is made the subset is on the host anyway. It is kept as a file
of its own, which outlives the checkpoint, and compared with the first and with
the last one that were kept. Between checkpoints all of this costs nothing, and
it is the same for any number of devices and however often a run is resumed.
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
  """What is said of a subset when it is saved.

  Attributes:
    overlaps: `overlap/first` and `overlap/last_saved`: the share of the first
      and of the last saved subset that is still free (Eq. 9).
    distances: `histogram` of how far the free components are from the seed.
  """

  overlaps: dict[str, float]
  distances: np.ndarray


class History:
  """The subsets of a run so far."""

  def __init__(self, folder: str | os.PathLike[str], keep: bool) -> None:
    """Reads nothing yet.

    Args:
      folder: MODEL_DIR.
      keep: whether each subset gets a file.
    """
    self._folder = epath.Path(folder) / FOLDER
    self._keep = keep
    self._first: subset_lib.Subset | None = None
    self._last: subset_lib.Subset | None = None

  def resume(self, step: int, subset: subset_lib.Subset) -> None:
    """Goes on from a checkpoint.

    Args:
      step: its step; files of later ones will be written anew.
      subset: its subset.
    """
    self._last = subset
    before = [path for at, path in files(self._folder.parent) if at <= step]
    try:
      self._first = subset_lib.load(before[0])[0] if before else None
    except UserError:  # It is only looked at.
      self._first = None

  def add(
    self, step: int, subset: subset_lib.Subset, about: Mapping[str, Any]
  ) -> dict[str, float]:
    """Takes the subset of a checkpoint; returns its overlaps.

    Args:
      step: the checkpoint's.
      subset: the checkpoint's.
      about: the metadata of docs/subset_format.md.

    Raises:
      UserError: its file cannot be written.
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
  """Returns step and file of all subsets that a run kept, in order.

  Args:
    folder: MODEL_DIR.
  """
  found = (epath.Path(folder) / FOLDER).glob('*.dst')
  return sorted((int(p.stem), p) for p in found if p.stem.isdigit())


def distances_from_seed(
  subset: subset_lib.Subset, seed: PyTree, distance: str
) -> np.ndarray:
  """Returns how far each free component is from its seed.

  Args:
    subset: what is free.
    seed: θ⁰ on the host, stacked or not.
    distance: a name in `distances.DISTANCES` (Table 1), not divided by
      anything; for any other the absolute difference.

  Returns:
    float32 [k].
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
  # All at once: JAX compiles for each shape.
  measure = distances.DISTANCES.get(distance, distances.absolute)
  return np.asarray(measure(jnp.asarray(new), jnp.asarray(old)))


def histogram(values: np.ndarray) -> np.ndarray:
  """Returns a histogram of logarithms to base 10.

  Args:
    values: [k], not negative; what is zero or not finite is left out.

  Returns:
    float64 [bins, 3]: lower edge, upper edge, count; four bins a decade.
  """
  logs = np.log10(values[(values > 0) & np.isfinite(values)], dtype=np.float64)
  if not len(logs):
    return np.zeros((0, 3))
  bins = np.floor(logs * _BINS_PER_DECADE).astype(int)
  counts = np.bincount(bins - bins.min())
  lower = (bins.min() + np.arange(len(counts))) / _BINS_PER_DECADE
  return np.stack([lower, lower + 1 / _BINS_PER_DECADE, counts], axis=1)
