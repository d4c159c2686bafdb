"""A run and its folder: identity, seed, resumption, checkpoints, results.

MODEL_DIR/
  run.json          what the run is: its configuration and its seed
  .lock             held by the process that trains here
  config.gin        every parameter that gin supplied, defaults included
  checkpoints/      see `checkpoints`
  metrics.jsonl     all metrics, a row a report; events.…: the same for
                    TensorBoard
  evaluation/       predictions, as JSON lines
  best.json         which checkpoint counts, with KEEP_BEST_BY; see `best`
  report.json       at the end: what was trained, how much, and the scores
  last.dst, best.dst, or last_adapter/, best_adapter/: see `outcome`
  subsets/          the subset of each checkpoint; see `history`
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
import contextlib
import fcntl
import functools
import json
import math
import os
from typing import IO, Any, NoReturn, Self

from absl import logging
from etils import epath
import jax
import jax.numpy as jnp
import numpy as np

import dst_t5x
from dst_t5x import subsets as subset_lib
from dst_t5x.checkpoints import best
from dst_t5x.checkpoints import peft_files
from dst_t5x.checkpoints import run_folder
from dst_t5x.checkpoints import seeds
from dst_t5x.config import binaries
from dst_t5x.core import errors
from dst_t5x.core import metrics_file
from dst_t5x.core import object_stores
from dst_t5x.core import parts
from dst_t5x.core import stacking
from dst_t5x.core import whole_files
from dst_t5x.core.errors import UserError
from dst_t5x.data import data_position
from dst_t5x.engine import budget as budget_lib
from dst_t5x.engine import finiteness
from dst_t5x.engine import parameters
from dst_t5x.engine import partitioning
from dst_t5x.engine import trainer as trainer_lib
from dst_t5x.runs import history as history_lib
from dst_t5x.runs import identity
from dst_t5x.runs import outcome
from dst_t5x.runtime import preemption
from dst_t5x.runtime import processes

PyTree = Any

_all_finite = jax.jit(finiteness.all_finite)


class Run:
  """One training run; a context manager that closes its files."""

  def __init__(
    self,
    model_dir: str | os.PathLike[str],
    trainer: trainer_lib.Trainer,
    space: parameters.ParameterSpace,
    partitioner: partitioning.Partitioner,
    task: str,
    keep: int = 1,
    keep_best_by: str | None = None,
    keep_subsets: bool = True,
  ) -> None:
    """Opens the folder, which may hold an interrupted run.

    Args:
      model_dir: MODEL_DIR.
      trainer: its projection says what is saved.
      space: its network's parameters.
      partitioner: where they live.
      task: what it trains on.
      keep: see `checkpoints.RunFolder`.
      keep_best_by: name of a metric whose best checkpoint is kept too, see
        `best`.
      keep_subsets: whether the subset of each checkpoint gets a file.

    Raises:
      UserError: the folder cannot be written to, or another process is at it.
    """
    self.path = epath.Path(model_dir)
    self.eval_dir = os.fspath(self.path / 'evaluation')
    self.space = space
    self.fixed = trainer_lib.Fixed()
    self._trainer = trainer
    self._task = task
    self._adapter = trainer.network.adapter
    self._shapes, self._frozen_shapes = trainer.split(self.space.shapes)
    self._partitioner = partitioner
    self._reference: dict[str, Any] | None = None
    self._params: PyTree = None  # θ⁰ on the host, all of it.
    self._record: dict[str, Any] = {}  # What `run.json` says.
    self._keep_best_by = keep_best_by
    self._results: dict[int, dict[str, float]] = {}  # Step -> its evaluation's.
    self._lock: IO[str] | None = None
    if processes.is_first():
      self._keep_others_out()
    processes.wait_for_all()
    self._folder = run_folder.RunFolder(self.path, keep, self._best_of)
    self._history = history_lib.History(self.path, keep_subsets)

  def _keep_others_out(self) -> None:
    """Makes the folder, and locks it for as long as this process lives."""
    if object_stores.is_remote(self.path):
      return  # Object stores know no locks.
    try:
      self.path.mkdir(parents=True, exist_ok=True)
      self._lock = (self.path / '.lock').open('w')
    except OSError as e:
      raise UserError(f'MODEL_DIR {self.path} cannot be written to: {e}') from e
    try:
      fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
      raise UserError(
        f'another process trains in MODEL_DIR {self.path}: wait until it has '
        'ended, or choose another MODEL_DIR'
      ) from e
    for folder in (self.path, self.path / history_lib.FOLDER):
      whole_files.sweep(folder)

  def __enter__(self) -> Self:
    return self

  def __exit__(self, kind: Any, error: BaseException | None, *_: Any) -> None:
    try:
      # Among several, closing waits for the others, who may not come.
      if error is None or jax.process_count() == 1:
        self._folder.close()
    except UserError:
      if error is None:
        raise
    finally:
      if self._lock is not None:
        self._lock.close()
    if error and errors.is_io(error):  # A full disk, most likely.
      reason = object_stores.reason(error, self.path)
      raise UserError(
        f'cannot write to MODEL_DIR {self.path}: {reason}; '
        f'{self._folder.what_is_whole}'
      ) from error

  def claim(self, binary: Callable[..., Any], rows: Mapping[str, Any]) -> None:
    """Checks that the folder is empty or this very run's.

    Args:
      binary: what gin configured.
      rows: `task_checks.rows_of` what is trained on.

    Raises:
      UserError: the folder's run had another configuration, or other rows.
    """
    self._record = {'config': identity.of(binary), 'rows': rows}
    identity.check(self.path, self._record['config'])
    identity.check_rows(self.path, rows)

  def load_seed(
    self, path: str | None, from_scratch: bool, random_seed: int
  ) -> None:
    """Loads θ⁰, or makes random parameters where that is asked for.

    Args:
      path: INITIAL_CHECKPOINT_PATH.
      from_scratch: whether there is no seed, on purpose.
      random_seed: of the random parameters.

    Raises:
      UserError: there is no seed, it is not for this network, or it is not
        the one that the folder's run started from.
    """
    projection = self._trainer.projection
    path = self._trainer.seed_path(self.space.shapes, path, from_scratch)
    if path is None:
      logging.info('training from scratch, random seed %d', random_seed)
      self._params = lambda: self.space.initialize(random_seed)
    else:
      seed = seeds.load_seed(path).merged()
      self._reference = seed.reference
      self.space.check(seed.params, base=True)
      processes.agree('the fingerprint of the seed', seed.fingerprint)
      self._params = seed.params
    self._check_seed()
    to_devices = self.space.to_devices
    self.program = self._trainer.program(self._shapes)
    self.fixed = trainer_lib.Fixed(
      seed=to_devices(self._params, self._shapes)
      if projection.keep_seed
      else (),
      frozen=to_devices(self._params, self._frozen_shapes)
      if self._frozen_shapes
      else (),
    )
    self.budget = budget_lib.of_run(
      self.space.base_shapes,
      self._shapes,
      projection,
      # Scores as long as they may be expected.
      self._about(0) | {'scores': dict.fromkeys(('eval/loss', 'step'), 1 / 3)},
    )
    self._log_budget()

  def _check_seed(self) -> None:
    """Compares the seed with that of the folder's run; else claims it."""
    identity.check_seed(self.path, self._reference)
    self._record |= {
      'seed': self._reference,
      'version': dst_t5x.__version__,
    }
    if processes.is_first():
      run_folder.write_run_file(self.path, self._record)
      (self.path / 'config.gin').write_text(binaries.operative_config())

  def _log_budget(self) -> None:
    logging.info('budget: %s', self.budget)
    if table := self._trainer.projection.table(self._shapes):
      logging.info('the budget of each silo:\n%s', table)

  def begin(
    self, random_seed: int, encode: Callable[[str], list[int]]
  ) -> tuple[trainer_lib.TrainState, None]:
    """Returns the state at the seed, and the start of the data.

    Args:
      random_seed: of what an adapter adds.
      encode: text -> pieces, for prompts that start as texts.
    """
    if callable(self._params):
      params = self._params()
    elif self._adapter.added:
      added = parameters.initialize_added(
        self._trainer.network,
        self._params,
        random_seed,
        encode,
        self._partitioner,
      )
      params = self.space.to_devices(added)
    else:
      params = self.space.to_devices(self._params, self._shapes)
    init = jax.jit(trainer_lib.Trainer.init, out_shardings=self.state_shardings)
    state = init(self.program, params)
    self._forget_seed()
    return state, None

  def resume(self) -> tuple[trainer_lib.TrainState, bytes] | None:
    """Returns state and data position of the last checkpoint, if any."""
    step = self._folder.latest_step
    processes.agree(f'the last checkpoint in {self.path}', step)
    self._recall(step or 0)
    if step is None:
      return None
    params, found = self._load(step)
    if found is not None:
      self._history.resume(step, found)
    shardings = self.state_shardings
    abstract = jax.eval_shape(self._trainer.init, self._shapes)
    like = jax.tree.map(
      lambda leaf, sharding: jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=sharding
      ),
      abstract,
      shardings,
    )
    changing = _changing(like)
    restored = run_folder.unflatten(
      changing, self._folder.state(step, run_folder.flatten(changing))
    )
    state = trainer_lib.TrainState(
      **restored,
      step=partitioning.place(
        np.array(step, np.int32), self._partitioner.replicated
      ),
      params=self.space.to_devices(params, self._shapes),
    )
    self._forget_seed()
    logging.info('resumed %s at step %d', self.path, step)
    return state, self._folder.position(step)

  def _recall(self, step: int) -> None:
    """Remembers the evaluations up to a step, and which checkpoint counts."""
    rows = [
      row
      for row in metrics_file.read(self.path)
      if 'eval/loss' in row and row['step'] <= step
    ]
    # The first process wrote them; others may see older ones.
    rows = json.loads(processes.gather(json.dumps(rows))[0])
    self._results = {row['step']: row for row in rows}
    self._write_best()

  @contextlib.contextmanager
  def kept_whole(self) -> Iterator[None]:
    """Has what is being saved written to the end before an error goes on."""
    try:
      yield
    except Exception:
      self._folder.wait()
      raise

  def lacks_evaluation(self, step: int) -> bool:
    """Whether a step's evaluation is missing, as after a kill within it."""
    return step > 0 and step not in self._results

  def evaluated(self, step: int, results: Mapping[str, float]) -> None:
    """Takes the results of an evaluation; says which checkpoint counts now."""
    known = {k: float(v) for k, v in results.items() if not math.isnan(v)}
    self._results[step] = {'step': step} | known
    self._write_best()

  def _best_of(self, steps: Collection[int]) -> int | None:
    """Returns which of some checkpoints is the best by KEEP_BEST_BY."""
    by = self._keep_best_by
    values = {
      step: results[by]
      for step, results in self._results.items()
      if step in steps and by in results
    }
    return best.best_step(values, by) if by else None

  def _counts(self, step: int) -> int:
    """Returns which checkpoint counts; without a best one that of `step`."""
    # An earlier call may have had a KEEP_BEST_BY that this one has not.
    said = (best.read(self.path) or {}).get('step')
    said = json.loads(processes.gather(json.dumps(said))[0])
    return said if said in self._folder.steps else step

  def _write_best(self) -> None:
    if processes.is_first():
      best.write(self.path, self._keep_best_by, self._folder.steps)

  def _load(self, step: int) -> tuple[PyTree, subset_lib.Subset | None]:
    """Returns what was trained up to a checkpoint, unstacked, on the host.

    Returns:
      The parameters, and the subset if they are one.
    """
    saved = self._folder.parameters(step)
    if 'dense' in saved:
      return stacking.unstack_layers(saved['dense']), None
    found = subset_lib.from_arrays(saved)
    return subset_lib.apply(found, self._params), found

  @property
  def _leaves_subset(self) -> bool:
    """Whether the result is a subset of the seed's own parameters."""
    is_partial = bool(self._frozen_shapes) and not self._adapter.added
    return self._trainer.projection.constrains or is_partial

  def _forget_seed(self) -> None:
    """Frees the host's copy where no subset has to be told from it."""
    if not self._leaves_subset:
      self._params = None

  @functools.cached_property
  def state_shardings(self) -> trainer_lib.TrainState:
    """Where what a step changes lies: as the parameters, or everywhere."""
    abstract = jax.eval_shape(self._trainer.init, self._shapes)
    return self._partitioner.like_parameters(
      abstract, self._shapes, parts.select(self.space.shardings, self._shapes)
    )

  def save(
    self,
    step: int,
    state: trainer_lib.TrainState,
    position: bytes | None,
  ) -> history_lib.Report | None:
    """Begins to write a checkpoint; training may go on meanwhile.

    Args:
      step: steps done.
      state: the training state.
      position: the data's.

    Returns:
      What there is to say of the subset, if there is one.

    Raises:
      UserError: it cannot be written, or parameters are not finite.
    """
    assert position is not None, 'the data was not told of this step'
    # A finite loss may precede parameters that are not.
    if not _all_finite(state):
      self._folder.wait()
      raise UserError(
        f'a parameter is not finite after step {step}: lower the learning '
        f'rate, or look at the data; {self._folder.what_is_whole}'
      )
    saved: dict[str, Any] = {'dense': state.params}
    found = None
    if self._trainer.projection.constrains:
      found = self._extract(state.params)
      saved = subset_lib.to_arrays(found)
    # The next step overwrites these arrays while they are being written.
    saved, changing = jax.tree.map(_copy, (saved, _changing(state)))
    self._folder.save(
      step,
      saved,
      run_folder.flatten(changing),
      data_position.merge(position, processes.gather_bytes),
      self._about(step) | {'run': self._record},
    )
    if found is None or not processes.is_first():
      return None
    return self._remember(step, found)

  def _remember(
    self, step: int, found: subset_lib.Subset
  ) -> history_lib.Report:
    """Adds a checkpoint's subset to the run's history."""
    distance = self._trainer.projection.settings().get('distance', '')
    moved = history_lib.distances_from_seed(found, self._params, distance)
    return history_lib.Report(
      self._history.add(step, found, self._about(step)),
      history_lib.histogram(moved),
    )

  def _extract(self, trained: PyTree) -> subset_lib.Subset:
    """Returns what differs from the seed, whole in each process.

    Args:
      trained: the trained parameters, all or some, stacked or not; on the
        devices if there are several processes.
    """
    if jax.process_count() > 1:
      here = subset_lib.to_arrays(
        subset_lib.extract_here(trained, self._params)
      )
      blobs = processes.gather_bytes(here['subset'].tobytes())
      return subset_lib.merge(
        [
          subset_lib.from_arrays({'subset': np.frombuffer(blob, np.uint8)})
          for blob in blobs
        ]
      )
    return self._extract_on_host(trained)

  def _extract_on_host(self, trained: PyTree) -> subset_lib.Subset:
    """Returns what differs from the seed in what this process has."""
    if self._frozen_shapes:
      trained = parts.join(self._params, stacking.unstack_layers(trained))
    return subset_lib.extract(trained, self._params)

  def _about(self, step: int) -> dict[str, Any]:
    settings = self._trainer.projection.settings()
    return {
      'step': step,
      'seed': self._reference,
      'task': self._task,
      'epsilon': settings.get('epsilon'),
      'silos': settings.get('silos'),
      'distance': settings.get('distance'),
      'adapter': self._adapter.to_json(),
      'is_partial': bool(self._frozen_shapes),
      'parameters': self.space.size,
      'version': dst_t5x.__version__,
    }

  def stop(self, step: int) -> NoReturn:
    """Ends a run that was told to, once its checkpoint is written.

    Raises:
      preemption.Stopped: always; says after which step, and what is whole.
      UserError: the checkpoint could not be written.
    """
    self._folder.wait()
    raise preemption.Stopped(
      f'stopped after step {step}, by SIGTERM: {self._folder.what_is_whole}; '
      'the same command goes on from there'
    )

  def finish(
    self, step: int, state: trainer_lib.TrainState
  ) -> dict[str, float]:
    """Waits for the last checkpoint, writes the subset, or the adapter.

    Returns:
      The metrics of the last evaluation.
    """
    self._folder.tidy()
    self._write_best()
    trained = self._trained(state.params)
    counts = self._counts(step)
    names = [outcome.LAST] if counts != step else [outcome.LAST, outcome.BEST]
    best_params = None if counts == step else self._load(counts)[0]
    results = self._results[max(self._results)] if self._results else {}
    if processes.is_first():
      size = self._leave(names, step, trained)
      if best_params is not None:
        best_trained = (
          self._extract_on_host(best_params)
          if self._leaves_subset
          else best_params
        )
        self._leave([outcome.BEST], counts, best_trained)
      free = trained.size if self._trainer.projection.constrains else None
      outcome.write_report(self.path, step, self.budget, size, results, free)
    return results

  def _trained(self, trained: PyTree) -> Any:
    """Returns what is to be left of parameters, whole on the host.

    Returns:
      A subset, or an adapter's parameters; None if nothing is left.
    """
    if peft_files.is_known(self._adapter):
      gather = jax.jit(_same, out_shardings=self._partitioner.replicated)
      return jax.tree.map(np.asarray, gather(trained))
    return self._extract(trained) if self._leaves_subset else None

  def _leave(self, names: Sequence[str], step: int, trained: Any) -> int | None:
    """Writes what `_trained` returned under names; a file's bytes, if any."""
    about = self._about(step) | {'scores': self._results.get(step, {})}
    if peft_files.is_known(self._adapter):
      base = self.space.base_shapes
      return outcome.write_adapter(
        self.path, names, self._adapter, trained, base, about
      )
    if self._leaves_subset:
      return outcome.write_subset(self.path, names, trained, about)
    return None


def _changing(state: trainer_lib.TrainState) -> dict[str, PyTree]:
  """Returns what else a checkpoint holds, besides parameters and step."""
  return {
    'opt_state': state.opt_state,
    'projection_state': state.projection_state,
    'refused_steps': state.refused_steps,
    'refused_in_row': state.refused_in_row,
  }


def _same(tree: PyTree) -> PyTree:
  return tree


def _copy(x: Any) -> Any:
  return jnp.copy(x) if isinstance(x, jax.Array) else x
