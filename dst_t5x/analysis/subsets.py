"""Reads the subsets of runs: the final one, and those of checkpoints."""

from collections.abc import Callable, Sequence
import math

from etils import epath

from dst_t5x import subsets as subset_lib
from dst_t5x.analysis import runs as runs_lib
from dst_t5x.core.errors import UserError, first_line
from dst_t5x.method import silos
from dst_t5x.models import families
from dst_t5x.runs import history

Subset = subset_lib.Subset
Tell = Callable[[str], None]


class Reader:
  """Reads subsets; reports what cannot be read, and continues."""

  def __init__(self, tell: Tell) -> None:
    """Reads nothing yet.

    Args:
      tell: called with a line for each file that cannot be read.
    """
    self._tell = tell

  def at_end(self, run: runs_lib.Run) -> Subset | None:
    """Returns the subset of a run's chosen checkpoint, if there is one."""
    paths = [run.folder / 'best.dst', run.folder / 'last.dst']
    found = self._first_of(paths) or self._of_last_checkpoint(run)
    if found and found.fingerprint not in (None, run.fingerprint):
      self._tell(f'{run.folder}: its subset is not one of its seed')
      return None
    return found

  def _first_of(self, paths: Sequence[epath.Path]) -> Subset | None:
    for path in paths:
      if path.exists() and (found := self._load(path)):
        return found
    return None

  def _load(self, path: epath.Path) -> Subset | None:
    try:
      return subset_lib.load(path)[0]
    except UserError as e:
      self._tell(first_line(e))
      return None

  def _of_last_checkpoint(self, run: runs_lib.Run) -> Subset | None:
    found = self._of_checkpoints(run, last=True)
    return found[max(found)] if found else None

  def over_time(self, run: runs_lib.Run) -> dict[int, Subset]:
    """Returns step -> subset, for all steps that a run kept."""
    kept = history.files(run.folder)
    if len(kept) < 2:
      return self._of_checkpoints(run)
    loaded = {step: self._load(path) for step, path in kept}
    return {step: subset for step, subset in loaded.items() if subset}

  def _of_checkpoints(
    self, run: runs_lib.Run, last: bool = False
  ) -> dict[int, Subset]:
    """Returns step -> subset, for the checkpoints that still exist."""
    folder = run.folder / 'checkpoints'
    steps = [int(p.name) for p in folder.glob('*') if p.name.isdigit()]
    if not steps or (len(steps) < 2 and not last):
      return {}
    # Importing Orbax takes seconds, and most runs have subset files.
    from dst_t5x.checkpoints import run_folder

    opened = run_folder.RunFolder(run.folder, read_only=True)
    found = {}
    try:
      for step in sorted(steps)[-1:] if last else sorted(steps):
        saved = opened.parameters(step)
        if 'subset' not in saved:
          return {}
        found[step] = subset_lib.from_arrays(saved)
    except UserError as e:
      self._tell(first_line(e))
    finally:
      opened.close()
    return found


def modules(subset: Subset) -> dict[str, tuple[int, int]]:
  """Returns module -> free and all parameters, under the family's names."""
  family = families.of_paths(subset.tensors.keys())
  found: dict[str, tuple[int, int]] = {}
  for path, tensor in subset.tensors.items():
    module = family.module_name(silos.per_module(path))
    free, size = found.get(module, (0, 0))
    free += len(subset.positions.get(path, ()))
    found[module] = free, size + math.prod(tensor.shape)
  return dict(sorted(found.items()))
