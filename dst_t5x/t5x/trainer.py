"""T5X's trainer, which checks the seed and reports the subset."""

from typing import Any

import flax
import jax
from t5x import train_state as train_state_lib
from t5x import trainer

from dst_t5x.core.errors import UserError
from dst_t5x.method import api as methods
from dst_t5x.method import reports
from dst_t5x.method import silos
from dst_t5x.runs import monitor
from dst_t5x.t5x import optimizer as optimizer_lib

PyTree = Any


class SubsetTrainer(trainer.Trainer):
  """Checks the seed before the first step, and reports the subset.

  T5X restores by names, and with `fallback_to_scratch` fills missing parameters
  with random values. A seed that is not the pretrained checkpoint would destroy
  the model silently: the first projection resets nearly all parameters to it.
  """

  def __init__(
    self,
    train_state: train_state_lib.FlaxOptimTrainState,
    max_refused_steps: int = 3,
    **options: Any,
  ) -> None:
    """Checks the seed; the other arguments are T5X's.

    Args:
      train_state: the state that T5X restored.
      max_refused_steps: how many refused steps in a row end the run.
      **options: see `trainer.Trainer`.

    Raises:
      SystemExit: the seed is not the one that the parameters come from.
    """
    self._max_refused_steps = max_refused_steps
    self._monitor: monitor.SubsetMonitor | None = None
    optimizer = train_state._optimizer
    projection = optimizer.optimizer_def.projection
    try:
      check_seed(optimizer.optimizer_def, optimizer.target, optimizer.state)
    except UserError as error:
      raise SystemExit(f'error: {error}') from error
    super().__init__(train_state=train_state, **options)
    if projection.constrains:
      self._monitor = monitor.SubsetMonitor(
        *self._watched(train_state),
        optimizer.state.refused_in_row.sharding,
      )

  def train(self, *arguments: Any, **options: Any) -> Any:
    """Trains for some steps; see `trainer.Trainer.train`.

    Raises:
      SystemExit: too many steps in a row were not finite.
    """
    summary = super().train(*arguments, **options)
    if self._monitor is None:
      return summary
    state = self.train_state
    refused = int(state._optimizer.state.refused_in_row)
    if refused >= self._max_refused_steps:
      raise SystemExit(
        f'error: the last {refused} steps changed nothing: their update was not'
        ' finite; lower LEARNING_RATE'
      )
    step = int(state.step)
    for name, value in self._monitor.report(*self._watched(state)).items():
      self.train_metrics_manager.write_scalar(name, value, step)
    return summary

  def _watched(
    self, train_state: train_state_lib.FlaxOptimTrainState
  ) -> tuple[methods.Projection, PyTree, PyTree, PyTree]:
    """Returns the method, the trained parameters, its state, and the seed."""
    optimizer = train_state._optimizer
    trained, _ = optimizer.optimizer_def.split(optimizer.target)
    return (
      optimizer.optimizer_def.projection,
      flax.core.unfreeze(trained),
      optimizer.state.projection,
      flax.core.unfreeze(optimizer.state.seed),
    )


def check_seed(
  definition: optimizer_lib.SubsetOptimizer,
  params: PyTree,
  state: optimizer_lib.SubsetState,
) -> None:
  """Checks that the seed is the one that the parameters come from.

  At the start of a run the parameters equal the seed, and later they differ
  from it in as many components as the budget allows. A random seed differs in
  nearly all components.

  Args:
    definition: the optimizer.
    params: all parameters.
    state: the optimizer's state, with the seed.

  Raises:
    UserError: more components differ than the budget allows.
  """
  projection = definition.projection
  if not projection.constrains:
    return
  params = flax.core.unfreeze(definition.split(params)[0])
  kept = flax.core.unfreeze(state.seed)
  seed = jax.jit(projection.seed)(params, kept, state.projection)
  if not projection.may_have_made(params, seed):
    layout = silos.make_layout(params, 'per_tensor')
    free = reports.count_free(layout, params, seed).sum()
    raise UserError(
      f'{free:,} of {layout.size:,} parameters differ from the seed, '
      f'where the budget is {projection.free(params):,}: the seed is not the '
      'checkpoint '
      'that they were restored from. Start from INITIAL_CHECKPOINT_PATH with '
      'gin/t5x/finetune.gin, without assignment_map or fallback_to_scratch; to '
      'resume, keep EPSILON and SILOS as they were'
    )
