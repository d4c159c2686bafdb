"""A run in progress: its training state, from the seed or a checkpoint.

The types enforce the order of the preparations: a `Session` takes a
`LoadedSeed`, which comes from a `Claim`, which takes a `ModelDir`. A session
has its training state from the start.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import functools
import os
from typing import Any, NoReturn, Self

from absl import logging
import jax
import numpy as np

from dst_t5x.checkpoints import run_folder
from dst_t5x.core import parts
from dst_t5x.core.errors import UserError
from dst_t5x.engine import budget as budget_lib
from dst_t5x.engine import narrow
from dst_t5x.engine import parameters
from dst_t5x.engine import partitioning
from dst_t5x.engine import trainer as trainer_lib
from dst_t5x.method import moved
from dst_t5x.runs import artifacts
from dst_t5x.runs import checkpoints as checkpoints_lib
from dst_t5x.runs import claim
from dst_t5x.runs import evaluations as evaluations_lib
from dst_t5x.runs import extraction as extraction_lib
from dst_t5x.runs import history
from dst_t5x.runs import plan as plan_lib
from dst_t5x.runtime import preemption
from dst_t5x.runtime import processes

PyTree = Any


class Session:
  """A run with its training state; a context manager that closes its files.

  Attributes:
    path: MODEL_DIR.
    trainer: network, optimizer, projection and loss.
    phase: the trainer of the projection's present phase.
    step: the number of completed steps.
    state: the training state after these steps, θ as `narrow` holds it.
    position: the position in the data at which the session begins; None for the
      start of the data.
    constants: the inputs of a step that no step changes.
    budget: the method's budget.
  """

  def __init__(
    self,
    seed: claim.LoadedSeed,
    trainer: trainer_lib.Trainer,
    space: parameters.ParameterSpace,
    partitioner: partitioning.Partitioner,
    plan: plan_lib.Plan,
    random_seed: int,
    encode: Callable[[str], list[int]],
  ) -> None:
    """Continues from the last checkpoint, or else begins at the seed.

    Args:
      seed: θ⁰, in a MODEL_DIR that belongs to this run. The session keeps only
        the parts that it needs.
      trainer: network, optimizer, projection and loss.
      space: the network's parameters.
      partitioner: the mesh and its shardings.
      plan: which checkpoints and subsets to keep.
      random_seed: the seed of random parameters and of dropout.
      encode: text -> ids, for prompts that start as texts.

    Raises:
      UserError: a checkpoint cannot be read.
    """
    self.path = seed.folder.path
    self.trainer = trainer
    self._evaluations = evaluations_lib.Evaluations(
      self.path, plan.keep_best_by
    )
    self._space = space
    self._partitioner = partitioner
    _, frozen = self._shapes = trainer.split(space.shapes)
    self._dropout_key = partitioner.key(random_seed)
    adapter = trainer.network.adapter
    constrains, is_partial = trainer.projection.constrains, bool(frozen)
    self._facts = _facts(seed, trainer, space, is_partial)
    # Only for runs whose result is a subset of the seed's own parameters.
    extraction = None
    if constrains or (is_partial and not adapter.added):
      extraction = extraction_lib.Extraction(seed.params, is_partial)
    self._artifacts = artifacts.Artifacts(
      self.path, adapter, space.base_shapes, extraction, partitioner.replicated
    )
    with contextlib.ExitStack() as stack:
      folder = run_folder.RunFolder(
        self.path, plan.keep, self._evaluations.best_of
      )
      stack.push(functools.partial(_close, folder))
      self._checkpoints = checkpoints_lib.Checkpoints(
        folder,
        extraction if constrains else None,
        self._facts,
        seed.record,
        plan.keep_subsets,
      )
      self._begin_phase(folder.latest_step or 0)
      params = space.with_fixed(seed.params)
      self.constants = self._place_constants(params)
      self.budget = self._count_budget()
      self.position: bytes | None = None
      self.state = self._resumed() or self._begun(params, random_seed, encode)
      self.step = int(self.state.step)
      self._closing = stack.pop_all()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *error: Any) -> None:
    self._closing.__exit__(*error)

  def _place_constants(self, seed: PyTree) -> trainer_lib.Constants:
    """Returns the seed and the frozen parameters, on the devices.

    Args:
      seed: the seed's parameters, and the adapter's fixed tensors.
    """
    trained, frozen = self._shapes
    to_devices = self._space.to_devices
    seed = narrow.narrowed(self.trainer.seed_dtype, seed)
    return trainer_lib.Constants(
      seed=to_devices(seed, trained) if self._keep_seed else (),
      frozen=to_devices(seed, frozen) if frozen else (),
    )

  @property
  def _keep_seed(self) -> bool:
    """Whether a step needs θ⁰ on the devices."""
    return self.phase.projection.keep_seed or self._room is not None

  def _count_budget(self) -> budget_lib.Budget:
    """Returns the method's budget, and logs it."""
    trained, _ = self._shapes
    # Placeholders with as many digits as usual scores have.
    scores = dict.fromkeys(('eval/loss', 'step'), 1 / 3)
    about = self._about(0, scores)
    projection = self.trainer.projection
    budget = budget_lib.of_run(
      self._space.base_shapes,
      trained,
      projection,
      about,
      self.trainer.network.adapter,
    )
    logging.info('budget: %s', budget)
    if table := projection.table(trained):
      logging.info('the budget of each silo:\n%s', table)
    return budget

  def _resumed(self) -> trainer_lib.TrainState | None:
    """Returns the state of the last checkpoint; None if there is none."""
    folder = self._checkpoints.folder
    step = folder.latest_step
    processes.agree(f'the last checkpoint in {self.path}', step)
    self._evaluations.recall(step or 0)
    self._evaluations.write_best(folder.steps)
    if step is None:
      return None
    trained, _ = self._shapes
    like = jax.tree.map(
      lambda leaf, sharding: jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=sharding
      ),
      jax.eval_shape(self.phase.init, trained),
      self._whole_shardings,
    )
    restored = self._checkpoints.restore(step, like)
    self.position = restored.position
    replicated = self._partitioner.replicated
    return self._held(
      trainer_lib.TrainState(
        **restored.rest,
        step=partitioning.place(np.array(step, np.int32), replicated),
        params=self._space.to_devices(restored.params, trained),
      )
    )

  def _begun(
    self,
    seed: PyTree | None,
    random_seed: int,
    encode: Callable[[str], list[int]],
  ) -> trainer_lib.TrainState:
    """Returns the state before the first step; arguments as in `__init__`."""
    if seed is None:
      logging.info('training from scratch, random seed %d', random_seed)
      params = self._space.initialize(random_seed)
    elif self.trainer.network.adapter.added:
      added = parameters.initialize_added(
        self.trainer.network, seed, random_seed, encode, self._partitioner
      )
      params = self._space.to_devices(added)
    else:
      params = self._space.to_devices(seed, self._shapes[0])
    init = jax.jit(
      trainer_lib.Trainer.init, out_shardings=self._whole_shardings
    )
    return self._held(init(self._program, params))

  def _held(self, state: trainer_lib.TrainState) -> trainer_lib.TrainState:
    """Returns a state whose θ is whole in the form that a step takes."""
    if self._room is None:
      return state
    hold = jax.jit(
      narrow.held,
      static_argnames='room',
      out_shardings=self._shardings.params,
    )
    params = hold(state.params, self.constants.seed, self._room)
    return state._replace(params=params)

  @property
  def whole_state(self) -> trainer_lib.TrainState:
    """The training state with all of θ, in float32."""
    if self._room is None:
      return self.state
    params = self._theta(narrow.Held(self.state.params, self.constants.seed))
    return self.state._replace(params=params)

  def _begin_phase(self, step: int) -> None:
    """Prepares the functions of the phase that makes the step after `step`."""
    trained, _ = self._shapes
    self.phase = self.trainer.at(step)
    self._room = self.phase.room(self._space.shapes)
    self._program = self.phase.program(trained)
    abstract = jax.eval_shape(self.phase.init, trained)
    # Like the parameters, or replicated.
    whole: trainer_lib.TrainState = self._partitioner.like_parameters(
      abstract, trained, parts.select(self._space.shardings, trained)
    )
    self._whole_shardings = self._shardings = whole
    if self._room is not None:
      everywhere = self._partitioner.replicated
      self._shardings = whole._replace(params=everywhere)
      self._theta = jax.jit(narrow.Held.theta, out_shardings=whole.params)
    self._train_step = jax.jit(
      trainer_lib.Trainer.train_step,
      donate_argnames='state',
      out_shardings=(self._shardings, self._partitioner.replicated),
    )

  def _enter_phase(self) -> None:
    """Goes on to the phase that makes the next step."""
    before = self._program
    self._begin_phase(self.step)
    seed = self._whole_shardings.params if self._keep_seed else ()
    enter = jax.jit(
      _enter,
      static_argnames=('keep_seed', 'room'),
      out_shardings=(self._shardings, seed),
    )
    self.state, seed = enter(
      before,
      self._program,
      narrow.Held(self.state.params, self.constants.seed),
      self.state,
      self._keep_seed,
      self._room,
    )
    self.constants = self.constants._replace(seed=seed)
    logging.info('step %d: the next phase begins', self.step)

  def advance(
    self, batch: trainer_lib.Batch, report: bool
  ) -> dict[str, jax.Array]:
    """Makes one training step; returns its metrics.

    Args:
      batch: the network's features, each [batch, length], on the devices.
      report: whether to compute norms.
    """
    self.state, metrics = self._train_step(
      self._program,
      self.state,
      self.constants,
      batch,
      self._dropout_key,
      np.bool_(report),
    )
    self.step += 1
    if self.step in self.trainer.projection.phase_starts:
      self._enter_phase()
    return metrics

  @property
  def evaluation_folder(self) -> str:
    """The folder for predictions."""
    return os.fspath(self.path / 'evaluation')

  @property
  def params(self) -> PyTree:
    """All parameters of the network, after `step`, in float32."""
    frozen = moved.wide(self.constants.frozen)
    return parts.join(self.whole_state.params, frozen)

  def save(self, position: bytes) -> history.Report | None:
    """Starts to write a checkpoint; see `Checkpoints.save`.

    Args:
      position: the position in the data.
    """
    return self._checkpoints.save(self.step, self.whole_state, position)

  @contextlib.contextmanager
  def kept_whole(self) -> Iterator[None]:
    """On an error in the block, waits for the checkpoint that is written."""
    try:
      yield
    except Exception:
      self._checkpoints.folder.wait()
      raise

  @property
  def lacks_evaluation(self) -> bool:
    """Whether `step` was not evaluated, such as after a kill in it."""
    return self._evaluations.lacks(self.step)

  def evaluated(self, results: Mapping[str, float]) -> None:
    """Adds the results of an evaluation, and updates `best.json`."""
    self._evaluations.add(self.step, results)
    self._evaluations.write_best(self._checkpoints.folder.steps)

  def stop(self) -> NoReturn:
    """Ends a run that SIGTERM stops, after its checkpoint is written.

    Raises:
      preemption.Stopped: always; names the step and the last whole checkpoint.
      UserError: the checkpoint could not be written.
    """
    folder = self._checkpoints.folder
    folder.wait()
    raise preemption.Stopped(
      f'stopped after step {self.step}, by SIGTERM: {folder.what_is_whole}; '
      'the same command goes on from there'
    )

  def finish(self) -> dict[str, float]:
    """Waits for the last checkpoint, and writes artifacts and `report.json`.

    Returns:
      The metrics of the last evaluation.
    """
    folder = self._checkpoints.folder
    folder.tidy()
    self._evaluations.write_best(folder.steps)
    counts = self._evaluations.counting_step(self.step, folder.steps)
    best = None if counts == self.step else self._checkpoints.parameters(counts)
    params = self.whole_state.params
    last = self._artifacts.gather(params, self.constants.frozen)
    if processes.is_first():
      names = [artifacts.LAST]
      if best is None:
        names.append(artifacts.BEST)
      else:
        on_host = self._artifacts.on_host(best, last)
        self._leave([artifacts.BEST], counts, on_host)
      size = self._leave(names, self.step, last)
      free = last.size if self.trainer.projection.constrains else None
      artifacts.write_report(
        self.path, self.step, self.budget, size, self._evaluations.last, free
      )
    return self._evaluations.last

  def _leave(self, names: list[str], step: int, left: Any) -> int | None:
    return self._artifacts.write(
      names, left, self._about(step, self._evaluations.of(step))
    )

  def _about(self, step: int, scores: Mapping[str, float]) -> dict[str, Any]:
    return {'step': step, **self._facts, 'scores': scores}


def _enter(
  before: trainer_lib.Trainer,
  program: trainer_lib.Trainer,
  held: narrow.Held,
  state: trainer_lib.TrainState,
  keep_seed: bool,
  room: int | None,
) -> tuple[trainer_lib.TrainState, PyTree]:
  """Returns the first state of a phase, and θ⁰ if its steps keep it.

  Args:
    before: the program of the phase before.
    program: the program of the phase that begins.
    held: the parameters at the end of the phase before, and θ⁰ if it kept that.
    state: the last state of the phase before.
    keep_seed: whether the phase that begins keeps θ⁰.
    room: see `narrow.room_for`.
  """
  seed = held.seed_for(before.projection, state.projection_state)
  whole = state._replace(params=held.theta())
  after = program.enter(whole, moved.wide(seed))
  kept = held.seed if room is not None else seed
  params = narrow.held(after.params, kept, room)
  return after._replace(params=params), kept if keep_seed else ()


def _facts(
  seed: claim.LoadedSeed,
  trainer: trainer_lib.Trainer,
  space: parameters.ParameterSpace,
  is_partial: bool,
) -> dict[str, Any]:
  """Returns a subset's metadata, except `step` and `scores`."""
  settings = trainer.projection.settings()
  return {
    'seed': seed.reference,
    'task': seed.record['task'],
    'epsilon': settings.get('epsilon'),
    'silos': settings.get('silos'),
    'distance': settings.get('distance'),
    'adapter': trainer.network.adapter.to_json(),
    'is_partial': is_partial,
    'parameters': space.size,
    'version': seed.record['version'],
  }


def _close(
  folder: run_folder.RunFolder, kind: Any, error: BaseException | None, _: Any
) -> None:
  """Closes a run's checkpoints; an earlier error takes precedence."""
  try:
    # After an error, closing could wait forever for other processes.
    if error is None or jax.process_count() == 1:
      folder.close()
  except UserError:
    if error is None:
      raise
