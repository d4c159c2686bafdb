"""Training, from a gin file's configuration to the jitted step."""

from collections.abc import Mapping
import contextlib
import dataclasses

from absl import logging
import jax
import numpy as np

from dst_t5x.core import parts
from dst_t5x.core import values
from dst_t5x.core.errors import UserError, nearest
from dst_t5x.data import pipeline
from dst_t5x.data import task_checks
from dst_t5x.engine import evaluation as evaluation_lib
from dst_t5x.engine import parameters
from dst_t5x.engine import partitioning
from dst_t5x.engine import trainer as trainer_lib
from dst_t5x.runs import monitor as monitor_lib
from dst_t5x.runs import preflight
from dst_t5x.runs import run as run_lib
from dst_t5x.runtime import preemption


@dataclasses.dataclass(frozen=True)
class TrainData:
  """What is trained on.

  Attributes:
    task: a registered seqio task or mixture.
    feature_lengths: feature -> pieces per row; longer examples are cut.
    batch_size: rows of a batch, over all devices.
    pack: whether short examples share a row.
    shards: parts into which seqio divides the data; each fills its share of the
      rows of every batch, and a process reads those only that its devices need.
      The batches depend on this number, and on no number of processes.
  """

  task: str
  feature_lengths: Mapping[str, values.Positive]
  batch_size: values.Positive
  pack: bool = True
  shards: values.Positive = 1

  def __post_init__(self) -> None:
    values.check_fields(self)
    if self.batch_size % self.shards:
      raise UserError(
        f'BATCH_SIZE = {self.batch_size} is not a multiple of DATA_SHARDS = '
        f'{self.shards}'
      )


@dataclasses.dataclass(frozen=True)
class Plan:
  """When to do what, in steps of this run.

  Attributes:
    train_steps: how many steps to train.
    log_period: steps between two rows of training metrics.
    eval_period: steps between two evaluations; the last step is evaluated too.
    checkpoint_period: steps between two checkpoints; the last step is saved
      too, and with `keep_best_by` every step that is evaluated.
    keep: how many of the latest checkpoints to keep.
    keep_best_by: name of the metric whose best checkpoint is kept too.
    max_refused_steps: how many steps in a row may be refused, for a loss or an
      update that is not finite, before training stops.
    keep_subsets: whether the subset of each checkpoint is kept as a file.
  """

  train_steps: values.Positive
  log_period: values.Positive = 10
  eval_period: values.Positive = 500
  checkpoint_period: values.Positive = 500
  keep: values.Positive = 1
  keep_best_by: str | None = None
  max_refused_steps: values.Positive = 3
  keep_subsets: bool = True

  def __post_init__(self) -> None:
    values.check_fields(self)

  def logs(self, step: int) -> bool:
    """Whether training metrics are written after this step."""
    return step % self.log_period == 0 or step == self.train_steps

  def evaluates(self, step: int) -> bool:
    """Whether an evaluation follows this step."""
    return step % self.eval_period == 0 or step == self.train_steps

  def saves(self, step: int) -> bool:
    """Whether a checkpoint is made after this step."""
    return (
      step % self.checkpoint_period == 0
      or step == self.train_steps
      or (self.keep_best_by is not None and self.evaluates(step))
    )

  def check_results(self, results: Mapping[str, float]) -> None:
    """Raises UserError if an evaluation lacks the metric of `keep_best_by`."""
    if self.keep_best_by is not None and self.keep_best_by not in results:
      raise UserError(
        f'KEEP_BEST_BY: no metric {self.keep_best_by!r}'
        f'{nearest(self.keep_best_by, results)} (known: {sorted(results)})'
      )


def train(
  model_dir: values.Path,
  trainer: trainer_lib.Trainer,
  train_data: TrainData,
  evaluation: evaluation_lib.Evaluation,
  plan: Plan,
  partitioner: partitioning.Partitioner,
  initial_checkpoint_path: values.Path | None = None,
  from_scratch: bool = False,
  random_seed: values.RandomSeed = 0,
  only_check: bool = False,
) -> dict[str, float]:
  """Trains, evaluates and saves; continues where an earlier call was killed.

  Args:
    model_dir: the run's folder.
    trainer: network, optimizer, projection and loss.
    train_data: what is trained on.
    evaluation: what is evaluated.
    plan: when to do what.
    partitioner: how devices share the work.
    initial_checkpoint_path: the seed, θ⁰, in any format of `seeds`.
    from_scratch: start from random parameters instead.
    random_seed: of initialisation, data order and dropout.
    only_check: whether to do no more than `python -m dst_t5x.preflight` does.

  Returns:
    The metrics of the last evaluation.

  Raises:
    UserError: something is missing, contradictory, or went wrong for a reason
      outside of the program.
    preemption.Stopped: SIGTERM came; the same call goes on.
  """
  partitioner = parameters.fit(
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
  task = task_checks.find(train_data.task)
  with (
    partitioner.activate(),
    run_lib.Run(
      model_dir,
      trainer,
      space,
      partitioner,
      train_data.task,
      plan.keep,
      plan.keep_best_by,
      plan.keep_subsets,
    ) as run,
  ):
    run.claim(train, task_checks.rows_of(task, 'train'))
    run.load_seed(initial_checkpoint_path, from_scratch, random_seed)
    state, position = run.resume() or run.begin(
      random_seed, task.output_features['inputs'].vocabulary.encode
    )
    step = int(state.step)
    is_due = plan.evaluates(step) and run.lacks_evaluation(step)
    if step >= plan.train_steps and not is_due:
      logging.info('nothing left to train: step %d is done', step)
      return run.finish(step, state)
    evaluator = evaluation.prepare(trainer.network, partitioner, run.eval_dir)
    train_step = jax.jit(
      trainer_lib.Trainer.train_step,
      donate_argnames='state',
      out_shardings=(run.state_shardings, partitioner.replicated),
    )
    dropout_key = partitioner.key(random_seed)
    monitor = monitor_lib.Monitor(
      run.path,
      trainer.projection,
      state,
      run.fixed.seed,
      plan.train_steps,
      plan.max_refused_steps,
      run.budget,
    )

    def evaluate() -> None:
      with monitor.paused():
        params = parts.join(state.params, run.fixed.frozen)
        results = evaluator(params, step)
      monitor.evaluated(step, results)
      run.evaluated(step, results)
      plan.check_results(results)

    logging.info('the first step is compiled first, which takes a while')
    with (
      preemption.Notice() as notice,
      contextlib.closing(monitor),
      pipeline.TrainIterator(
        task,
        train_data.feature_lengths,
        train_data.batch_size,
        trainer.network.feature_converter(train_data.pack),
        random_seed=random_seed,
        step=step,
        position=position,
        save_after=lambda step: notice.stops_after(step) or plan.saves(step),
        place=partitioner.place_batch,
        num_shards=train_data.shards,
        rows=partitioner.rows_here(train_data.batch_size),
      ) as batches,
    ):
      if is_due:  # The step was saved, and then the run was ended.
        evaluate()
      while step < plan.train_steps and step != notice.step:
        step, batch, position = next(batches)
        state, metrics = train_step(
          run.program,
          state,
          run.fixed,
          batch,
          dropout_key,
          np.bool_(plan.logs(step)),
        )
        monitor.record(step, metrics)
        if plan.logs(step):
          monitor.log(step, state)
        # Before the evaluation: should that fail, no step is lost.
        if position is not None:
          with monitor.paused():
            # What a refused step leaves was good, or never was: not known yet.
            if not monitor.is_refused:
              monitor.saved(step, run.save(step, state, position))
        if plan.evaluates(step):
          with run.kept_whole():
            evaluate()
    if step < plan.train_steps:
      run.stop(step)
    return run.finish(step, state)
