"""T5X's trainer, which looks at the seed before the first step."""

from typing import Any

import flax
import jax
import numpy as np
from t5x import train_state as train_state_lib
from t5x import trainer

from dst_t5x.core.errors import UserError
from dst_t5x.method import masks
from dst_t5x.method import projection as projection_lib
from dst_t5x.method import reports
from dst_t5x.runs import monitor
from dst_t5x.t5x import optimizer as optimizer_lib

PyTree = Any


class SubsetTrainer(trainer.Trainer):
  """Refuses to tune what is no seed, and reports the subset.

  T5X restores by names, and fills what a checkpoint lacks with random numbers
  if it is told to (`fallback_to_scratch`). A seed that is not the pretrained
  checkpoint would destroy the model without a word: the first projection resets
  nearly all parameters to it.
  """

  def __init__(
    self,
    train_state: train_state_lib.FlaxOptimTrainState,
    max_refused_steps: int = 3,
    **options: Any,
  ) -> None:
    """Checks the seed; the other arguments are T5X's.

    Args:
      train_state: as T5X has restored it.
      max_refused_steps: how many steps in a row may be refused.
      **options: see `trainer.Trainer`.

    Raises:
      SystemExit: the seed is none, or not that of the parameters.
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
    if isinstance(projection, projection_lib.SubsetProjection):
      self._monitor = monitor.SubsetMonitor(
        projection, *self._watched(train_state)
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
  ) -> tuple[PyTree, PyTree, PyTree]:
    """Returns what is trained, the projection's state, and the seed."""
    optimizer = train_state._optimizer
    trained, _ = optimizer.optimizer_def.split(optimizer.target)
    return (
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

  At the start of a run they are equal, and later they differ in as many places
  as the budget allows. A seed of random numbers differs nearly everywhere.

  Raises:
    UserError: it is not.
  """
  projection = definition.projection
  if not isinstance(projection, projection_lib.SubsetProjection):
    return
  trained = flax.core.unfreeze(definition.split(params)[0])
  layout = projection.layout(trained)
  budgets = np.array(layout.budgets(projection.epsilon))
  if projection.threshold == 'iterative':  # It may exceed the budget.
    budgets = np.maximum(budgets, np.array(layout.sizes) // 2)

  @jax.jit
  def free(trained: PyTree, kept: PyTree, state: PyTree) -> jax.Array:
    seed = projection.seed(trained, kept, state)
    nothing = masks.nothing(trained)
    return reports.subset_report(layout, trained, seed, nothing)[0]['free']

  kept = flax.core.unfreeze(state.seed)
  counts = np.asarray(free(trained, kept, state.projection))
  if (counts > budgets).any():
    raise UserError(
      f'{counts.sum():,} of {layout.size:,} parameters differ from the seed, '
      f'where the budget is {budgets.sum():,}: the seed is not the checkpoint '
      'that they were restored from. Start from INITIAL_CHECKPOINT_PATH with '
      'gin/t5x/finetune.gin, without assignment_map or fallback_to_scratch; to '
      'resume, keep EPSILON and SILOS as they were'
    )
