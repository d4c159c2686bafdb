"""95 % intervals of means over random seeds, by Student's t."""

from collections.abc import Mapping, Sequence
import math
from typing import Any, NamedTuple

import numpy as np
from scipy import stats


class Interval(NamedTuple):
  """A mean with its 95 % interval.

  Attributes:
    mean: the mean; NaN without values.
    half: half of the interval's width; NaN for less than two values.
    number: of values.
  """

  mean: float
  half: float
  number: int

  @property
  def low(self) -> float:
    """The lower end."""
    return self.mean - self.half

  @property
  def high(self) -> float:
    """The upper end."""
    return self.mean + self.half

  def signed(self, digits: int) -> str:
    """Returns `+1.2 [-0.3, +2.7]`."""
    ends = (f'{end:+.{digits}f}' for end in (self.low, self.high))
    return f'{self.mean:+.{digits}f} [{", ".join(ends)}]'


def of_mean(values: Sequence[float]) -> Interval:
  """Returns the mean of values [n], with its interval."""
  count = len(values)
  if not count:
    return Interval(math.nan, math.nan, 0)
  mean = float(np.mean(values))
  if count < 2:
    return Interval(mean, math.nan, count)
  error = np.std(values, ddof=1) / math.sqrt(count)
  half = float(stats.t.ppf(0.975, count - 1) * error)
  return Interval(mean, half, count)


def of_difference(a: Mapping[Any, float], b: Mapping[Any, float]) -> Interval:
  """Returns a − b with its interval, paired by the random seed.

  Runs of one random seed share the order of the data, so that their difference
  varies less than that of any two runs.

  Args:
    a: random seed -> score.
    b: the same of another setting; seeds that only one has do not count.
  """
  return of_mean([a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())])
