"""Claims a MODEL_DIR for a run, and loads the run's seed."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import dst_t5x
from dst_t5x.checkpoints import formats
from dst_t5x.checkpoints import run_folder
from dst_t5x.checkpoints import seeds
from dst_t5x.config import binaries
from dst_t5x.engine import parameters
from dst_t5x.engine import trainer as trainer_lib
from dst_t5x.runs import identity as identity_lib
from dst_t5x.runs import model_dir as model_dir_lib
from dst_t5x.runtime import processes

PyTree = Any


class LoadedSeed(NamedTuple):
  """θ⁰ of a run whose `run.json` is written.

  Attributes:
    folder: MODEL_DIR.
    record: the content of `run.json`.
    params: the parameters on the host, unstacked; None for a run from scratch.
  """

  folder: model_dir_lib.ModelDir
  record: Mapping[str, Any]
  params: PyTree | None

  @property
  def reference(self) -> dict[str, Any] | None:
    """`Seed.reference` of the seed; None for a run from scratch."""
    return self.record['seed']


class Claim:
  """A locked MODEL_DIR that is empty or has this run's settings and rows."""

  def __init__(
    self,
    folder: model_dir_lib.ModelDir,
    identity: identity_lib.Identity,
    rows: Mapping[str, Any],
  ) -> None:
    """Compares the run with the one in the folder.

    Args:
      folder: MODEL_DIR.
      identity: the settings that identify the run.
      rows: `task_checks.rows_of` the training data.

    Raises:
      UserError: the folder's run had another setting, or other rows.
    """
    identity_lib.check(folder.path, identity)
    identity_lib.check_rows(folder.path, rows)
    self._folder = folder
    self._record = {**identity.settings, 'rows': rows}

  def load_seed(
    self,
    trainer: trainer_lib.Trainer,
    space: parameters.ParameterSpace,
    path: str | None,
    from_scratch: bool,
  ) -> LoadedSeed:
    """Loads the seed, and writes `run.json`.

    Args:
      trainer: the trainer, whose method may need a seed.
      space: the network's parameters.
      path: INITIAL_CHECKPOINT_PATH.
      from_scratch: whether to start from random parameters.

    Raises:
      UserError: the seed is missing or does not fit the network, or the run in
        the folder started from another one.
    """
    path = trainer.seed_path(space.shapes, path, from_scratch)
    reference, params = None, None
    if path is not None:
      seed = seeds.load_seed(path).merged()
      space.check(seed, base=True)
      trainer.check_seed(seed.params, seed.path)
      processes.agree('the fingerprint of the seed', seed.fingerprint)
      reference, params = seed.reference, seed.params
    identity_lib.check_seed(self._folder.path, reference)
    record = {
      'format': formats.FORMAT,
      **self._record,
      'seed': reference,
      'version': dst_t5x.__version__,
    }
    if processes.is_first():
      run_folder.write_run_file(self._folder.path, record)
      config = self._folder.path / 'config.gin'
      config.write_text(binaries.operative_config())
    return LoadedSeed(self._folder, record, params)
