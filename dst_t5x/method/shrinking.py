"""Lists whose budget may shrink during training."""

import dataclasses
from typing import Any

from dst_t5x.core import values
from dst_t5x.method import schedules
from dst_t5x.method import sparse

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Shrinking(sparse.Sparse):
  """The base of methods that choose their list more than once.

  A choice has the budget of its step. The list has room for the first choice.

  Attributes:
    epsilon_schedule: how ε shrinks from `epsilon_start` to `epsilon`; see
      `SubsetProjection`.
    epsilon_start: the first ε of a budget that shrinks.
    epsilon_steps: after how many steps `epsilon` is reached.

  Raises:
    UserError: as `Sparse`; or the schedule is incomplete.
  """

  epsilon_schedule: schedules.Shape = 'constant'
  epsilon_start: values.Share | None = None
  epsilon_steps: values.Positive | None = None

  def __post_init__(self) -> None:
    super().__post_init__()
    _ = self.schedule  # Raises if it makes no sense.

  @property
  def schedule(self) -> schedules.Schedule:
    """How ε changes with the step."""
    return schedules.of(self)

  @property
  def largest(self) -> float:
    """The largest ε of the run, for which the list has room."""
    return self.schedule.most

  def settings(self) -> dict[str, Any]:
    """Returns the method's name and the settings that have an effect."""
    return self.schedule.without_idle(super().settings())

  def free_at_most(self, shapes: PyTree) -> int:
    """Returns the number of parameters in the largest list."""
    return sum(self.layout(shapes).budgets(self.largest))

  def budgets(self, params: PyTree, step: Any) -> Any:
    """Returns the budgets of a choice, uint32 [silos, 2].

    Args:
      params: the parameters.
      step: int32 [], the number of completed steps before the step.
    """
    table = self.schedule.table(self.layout(params))
    return self.schedule.look_up(table, step)
