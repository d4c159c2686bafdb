"""Chooses the best trial of a setting; all choices use this one rule.

A trial is one value that was tried, such as a learning rate, with a run for
each random seed. The rule:

1. Trials with a failed run, such as one that diverged, are excluded, unless
   every trial has one.
2. The best mean score wins: the highest, or the lowest if the metric is a loss
   (see `best.is_lower_better`). Means are taken over the random seeds that all
   remaining trials share, so that no trial wins by a lucky seed.
3. Among equal means, the trial with more random seeds wins, then the first.
"""

from collections.abc import Mapping, Sequence
import math
from typing import Any, NamedTuple

import numpy as np

from dst_t5x.checkpoints import best


class Trial(NamedTuple):
  """The runs of one value.

  Attributes:
    scores: random seed -> score of its finished run; None or NaN if the run has
      no score.
    is_failed: whether one of the runs failed.
  """

  scores: Mapping[Any, float | None]
  is_failed: bool = False


class Choice(NamedTuple):
  """The result of `choose`.

  Attributes:
    chosen: index of the best trial; None if no trial has a finished run.
    means: [trials], mean scores; NaN for a trial without one.
  """

  chosen: int | None
  means: list[float]


def choose(trials: Sequence[Trial], metric: str) -> Choice:
  """Returns the best trial of a setting, and the mean scores.

  Args:
    trials: the trials, in the order in which they were tried.
    metric: the name of the scores' metric.
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
  """Returns the mean over the common random seeds, or over all if none is."""
  values = [v for s, v in trial.scores.items() if s in common or not common]
  known = [v for v in values if v is not None and not math.isnan(v)]
  return float(np.mean(known)) if known else math.nan
