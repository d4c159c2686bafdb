"""Budgets that shrink during training, exact in every silo at every step.

Gradual pruning (Zhu and Gupta, 2017, Section 3) lets the share of pruned
weights rise by a cubic schedule. Here the share ε of free parameters falls from
a start to its end. The budgets of all steps are computed beforehand in exact
arithmetic, so a step only looks them up, and nothing is recompiled.
"""

from collections.abc import Callable, Mapping
import dataclasses
import math
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from dst_t5x.core import values
from dst_t5x.core.errors import UserError
from dst_t5x.method import silos
from dst_t5x.method import step as step_lib

Shape = Literal['constant', 'linear', 'cosine', 'cubic']
# The share of the way from start to end that is left, for a share of the steps.
_LEFT: Mapping[str, Callable[[float], float]] = {
  'linear': lambda x: 1 - x,
  'cosine': lambda x: (1 + math.cos(math.pi * x)) / 2,
  'cubic': lambda x: (1 - x) ** 3,
}
_SETTINGS = ('epsilon_schedule', 'epsilon_start', 'epsilon_steps')
# A table of budgets has at most so many rows; in a longer schedule several
# steps share a row.
_ROWS = 1000


@dataclasses.dataclass(frozen=True)
class Schedule:
  """How ε falls from `start` to `end`.

  Attributes:
    shape: `constant`, `linear`, `cosine`, or `cubic`.
    end: ε from the last step of the schedule on.
    start: ε at the beginning.
    steps: after how many steps `end` is reached.

  Raises:
    UserError: the start or the steps are missing, or the start is below the
      end.
  """

  shape: Shape
  end: values.Share
  start: values.Share | None = None
  steps: values.Positive | None = None

  def __post_init__(self) -> None:
    if self.is_constant:
      return
    if self.start is None or self.steps is None:
      raise UserError(
        f'EPSILON_SCHEDULE = {self.shape!r} needs EPSILON_START, the first '
        'share, and EPSILON_STEPS, after how many steps EPSILON is reached'
      )
    if self.start < self.end:
      raise UserError(
        f'EPSILON_START = {self.start:g} is below EPSILON = {self.end:g}: a '
        'budget that shrinks starts above its end'
      )

  def without_idle(self, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a method's settings without those that have no effect."""
    idle = _SETTINGS if self.is_constant else ()
    return {name: x for name, x in settings.items() if name not in idle}

  @property
  def is_constant(self) -> bool:
    """Whether ε never changes."""
    return self.shape == 'constant'

  @property
  def most(self) -> float:
    """The largest ε."""
    return self.end if self.is_constant else max(self._epsilon(0), self.end)

  @property
  def _stride(self) -> int:
    return -(-(self.steps or 1) // _ROWS)

  @property
  def _last(self) -> int:
    """The table's last row."""
    return -(-(self.steps or 1) // self._stride)

  def _epsilon(self, row: int) -> float:
    """Returns ε of a row of the table."""
    if row >= self._last:
      return self.end
    share = row * self._stride / (self.steps or 1)
    left = _LEFT[self.shape](share)
    return self.end + ((self.start or self.end) - self.end) * left

  def epsilon(self, step: int) -> float:
    """Returns ε after a number of completed steps."""
    if self.is_constant:
      return self.end
    return self._epsilon(min(-(-step // self._stride), self._last))

  def table(self, layout: silos.Layout) -> np.ndarray:
    """Returns the budgets of each row, uint32 [rows, silos, 2].

    The last axis is that of `step.halves`. A constant schedule has one row.
    """
    rows = [self.end]
    if not self.is_constant:
      rows = [self._epsilon(row) for row in range(self._last + 1)]
    return np.stack(
      [step_lib.halves(layout.budgets(epsilon)) for epsilon in rows]
    )

  def look_up(self, table: Any, step: Any) -> Any:
    """Returns the budgets after the step, uint32 [silos, 2].

    Args:
      table: what `table` returned.
      step: int32 [], the number of completed steps before the step; ignored if
        ε is constant.
    """
    if self.is_constant:
      return table[0]
    row = -(-(step + 1) // self._stride)
    return jnp.asarray(table)[jnp.minimum(row, self._last)]


def of(method: Any) -> Schedule:
  """Returns the schedule of a method that has `epsilon` and the settings."""
  return Schedule(
    method.epsilon_schedule,
    method.epsilon,
    method.epsilon_start,
    method.epsilon_steps,
  )
