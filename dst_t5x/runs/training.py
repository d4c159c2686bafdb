"""Training, from a gin configuration to the last step.

`Session.advance` calls the step itself, `trainer.Trainer.train_step`.
"""

from collections.abc import Callable, Iterator
import contextlib

from absl import logging

from dst_t5x.core import values
from dst_t5x.data import data_position
from dst_t5x.engine import evaluation as evaluation_lib
from dst_t5x.engine import held_out as held_out_lib
from dst_t5x.engine import parameters
from dst_t5x.engine import partitioning
from dst_t5x.engine import sources
from dst_t5x.engine import trainer as trainer_lib
from dst_t5x.runs import claim as claim_lib
from dst_t5x.runs import held_out
from dst_t5x.runs import identity
from dst_t5x.runs import model_dir as model_dir_lib
from dst_t5x.runs import monitor as monitor_lib
from dst_t5x.runs import plan as plan_lib
from dst_t5x.runs import preflight
from dst_t5x.runs import session as session_lib
from dst_t5x.runtime import preemption


def train(
  model_dir: values.Path,
  trainer: trainer_lib.Trainer,
  train_data: sources.TrainData,
  evaluation: evaluation_lib.Evaluation,
  plan: plan_lib.Plan,
  partitioner: partitioning.Partitioner,
  initial_checkpoint_path: values.Path | None = None,
  from_scratch: bool = False,
  random_seed: values.RandomSeed = 0,
  only_check: bool = False,
) -> dict[str, float]:
  """Trains, evaluates and saves; continues an interrupted run.

  Args:
    model_dir: the run's folder.
    trainer: network, optimizer, projection and loss.
    train_data: the training data.
    evaluation: the settings of the evaluation.
    plan: the steps at which to log, evaluate and save.
    partitioner: the mesh and its shardings.
    initial_checkpoint_path: the seed, θ⁰, in any format of `seeds`.
    from_scratch: whether to start from random parameters instead.
    random_seed: the seed of initialisation, data order and dropout.
    only_check: whether to only check, as `python -m dst_t5x.preflight` does.

  Returns:
    The metrics of the last evaluation.

  Raises:
    UserError: a setting, an input or the machine is at fault.
    preemption.Stopped: SIGTERM stopped the run; the same call continues it.
  """
  partitioner = parameters.choose_mesh(
    trainer.network, partitioner, partitioning.IN_TRAINING
  )
  space = parameters.ParameterSpace(trainer.network, partitioner)
  preflight.check_training(
    model_dir,
    preflight.Training(
      trainer,
      train_data,
      evaluation,
      plan,
      partitioner,
      space,
      train,
      initial_checkpoint_path,
      from_scratch,
    ),
    with_seed=only_check,
  )
  if only_check:
    return {}
  source = train_data.source
  with partitioner.activate(), model_dir_lib.ModelDir(model_dir) as folder:
    claim = claim_lib.Claim(
      folder,
      identity.of(train, source.recorded),
      source.rows_of(train_data.task, 'train'),
    )
    seed = claim.load_seed(
      trainer, space, initial_checkpoint_path, from_scratch
    )
    loss_of_seed = held_out.loss_of_seed(
      evaluation.held_out, seed, trainer.network, partitioner
    )
    with session_lib.Session(
      seed,
      trainer,
      space,
      partitioner,
      plan,
      random_seed,
      source.encode(train_data.task),
    ) as session:
      del seed  # The session keeps what it needs of it.
      _make_steps(
        session,
        train_data,
        evaluation,
        plan,
        partitioner,
        random_seed,
        loss_of_seed,
      )
      return session.finish()


def _make_steps(
  session: session_lib.Session,
  train_data: sources.TrainData,
  evaluation: evaluation_lib.Evaluation,
  plan: plan_lib.Plan,
  partitioner: partitioning.Partitioner,
  random_seed: int,
  loss_of_seed: float | None,
) -> None:
  """Makes the remaining steps; arguments as in `train`.

  `loss_of_seed` is the seed's loss on held-out text, if there is any.

  Raises:
    preemption.Stopped: SIGTERM came.
  """
  # The run ended after a save and before the evaluation.
  is_due = plan.evaluates(session.step) and session.lacks_evaluation
  if session.step >= plan.train_steps and not is_due:
    logging.info('nothing left to train: step %d is done', session.step)
    return
  last = session.trainer.projection.phase_starts[-1]
  if last > plan.train_steps:
    logging.warning(
      'TRAIN_STEPS = %d, and the last phase of the method begins at step %d: '
      'this run ends before it, and leaves more than the budget, or nothing',
      plan.train_steps,
      last,
    )
  evaluator = evaluation.prepare(
    session.trainer.network, partitioner, session.evaluation_folder
  )
  monitor = monitor_lib.Monitor(
    session.path,
    session.phase.projection,
    session.state,
    session.constants.seed,
    plan.train_steps,
    plan.max_refused_steps,
    session.budget,
  )

  def evaluate() -> None:
    with monitor.paused():
      results = held_out_lib.with_forgetting(
        evaluator(session.params, session.step), loss_of_seed
      )
    monitor.evaluated(session.step, results)
    session.evaluated(results)
    plan.check_results(results)

  logging.info('the first step is compiled first, which takes a while')
  with (
    preemption.Notice() as notice,
    contextlib.closing(monitor),
    train_data.source.train_batches(
      train_data,
      session.trainer.network,
      sources.Stretch(
        random_seed,
        session.step,
        session.position,
        save_after=lambda step: notice.stops_after(step) or plan.saves(step),
        place=partitioner.place_batch,
        rows=partitioner.rows_here(train_data.batch_size),
      ),
    ) as batches,
  ):
    if is_due:
      evaluate()
    while session.step < plan.train_steps and session.step != notice.step:
      _make_step(session, plan, monitor, batches, evaluate)
  if session.step < plan.train_steps:
    session.stop()


def _make_step(
  session: session_lib.Session,
  plan: plan_lib.Plan,
  monitor: monitor_lib.Monitor,
  batches: Iterator[data_position.TrainItem],
  evaluate: Callable[[], None],
) -> None:
  """Makes one step, and logs, saves and evaluates if the plan says so."""
  step, batch, position = next(batches)
  monitor.record(step, session.advance(batch, report=plan.logs(step)))
  if plan.logs(step):
    monitor.log(
      step, session.state, session.phase.projection, session.constants.seed
    )
  # Saved before the evaluation, so that no step is lost if that fails.
  if position is not None:
    with monitor.paused():
      # Not after a refused step: whether its state is good is not yet known.
      if not monitor.is_refused:
        monitor.saved(step, session.save(position))
  if plan.evaluates(step):
    with session.kept_whole():
      evaluate()
