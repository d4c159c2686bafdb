"""Which trial of a setting counts: the one rule of all that chooses.

A trial is a value that was tried, a learning rate say, with a run for each
random seed. Of a setting's trials the one counts

- of which no run failed, as those do that diverge, unless one of each did;
- whose mean score is the best: the highest, or the lowest of a metric that is a
  loss (see `best.is_lower_better`). Means are taken over the random seeds that
  all of these trials have, so that none wins by a lucky seed alone;
- of equal ones that with more random seeds, and then the first.
"""

from collections.abc import Mapping, Sequence
import math
from typing import Any, NamedTuple

import numpy as np

from dst_t5x.checkpoints import best


class Trial(NamedTuple):
  """What was tried.

  Attributes:
    scores: random seed -> score of its finished run; None or NaN if that has
      none.
    is_failed: whether a run of it failed.
  """

  scores: Mapping[Any, float | None]
  is_failed: bool = False


class Choice(NamedTuple):
  """What was chosen.

  Attributes:
    chosen: index of the trial that counts; None if there is no finished run.
    means: of all trials; NaN without a score.
  """

  chosen: int | None
  means: list[float]


def choose(trials: Sequence[Trial], metric: str) -> Choice:
  """Chooses among the trials of a setting.

  Args:
    trials: in the order in which they were tried.
    metric: what the scores are.
  """
  finished = [i for i, trial in enumerate(trials) if trial.scores]
  sound = [i for i in finished if not trials[i].is_failed]
  eligible = sound or finished
  seeds = [set(trials[i].scores) for i in eligible]
  common = set.intersection(*seeds) if seeds else set()
  means = [
    _mean(trial, common if i in eligible else set())
    for i, trial in enumerate(trials)
  ]
  sign = -1 if best.is_lower_better(metric) else 1

  def rank(i: int) -> tuple[float, int]:
    value = -math.inf if math.isnan(means[i]) else sign * means[i]
    return value, len(trials[i].scores)

  return Choice(max(eligible, key=rank, default=None), means)


def _mean(trial: Trial, common: set[Any]) -> float:
  """Returns the mean over the common random seeds, or else over its own."""
  values = [v for s, v in trial.scores.items() if s in common or not common]
  known = [v for v in values if v is not None and not math.isnan(v)]
  return float(np.mean(known)) if known else math.nan
