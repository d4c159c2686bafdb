"""The plan of a run: the steps at which it logs, evaluates and saves."""

from collections.abc import Collection
import dataclasses

from dst_t5x.core import values
from dst_t5x.core.errors import UserError, nearest


@dataclasses.dataclass(frozen=True)
class Plan:
  """The steps at which a run logs, evaluates and saves.

  Attributes:
    train_steps: the number of steps.
    log_period: steps between two rows of training metrics.
    eval_period: steps between two evaluations; the last step is evaluated too.
    checkpoint_period: steps between two checkpoints. The last step is saved
      too, and with `keep_best_by` every evaluated step.
    keep: how many of the latest checkpoints to keep.
    keep_best_by: the name of a metric; the best checkpoint by it is kept too.
    max_refused_steps: how many steps in a row may be refused, because they are
      not finite, before training stops.
    keep_subsets: whether to keep the subset of each checkpoint as a file.
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
    """Returns whether training metrics are written after this step."""
    return step % self.log_period == 0 or step == self.train_steps

  def evaluates(self, step: int) -> bool:
    """Returns whether an evaluation follows this step."""
    return step % self.eval_period == 0 or step == self.train_steps

  def saves(self, step: int) -> bool:
    """Returns whether a checkpoint is saved after this step."""
    return (
      step % self.checkpoint_period == 0
      or step == self.train_steps
      or (self.keep_best_by is not None and self.evaluates(step))
    )

  def check_results(self, results: Collection[str]) -> None:
    """Raises UserError if an evaluation lacks the metric of `keep_best_by`."""
    if self.keep_best_by is not None and self.keep_best_by not in results:
      raise UserError(
        f'KEEP_BEST_BY: no metric {self.keep_best_by!r}'
        f'{nearest(self.keep_best_by, results)} (known: {sorted(results)})'
      )
