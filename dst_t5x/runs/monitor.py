"""Reports during training: metrics, the subset, progress, and warnings."""

from collections.abc import Iterator, Mapping
import contextlib
import math
import os
from typing import Any

from absl import logging
import jax
import numpy as np

from dst_t5x.config import binaries
from dst_t5x.core import metrics_file
from dst_t5x.core.errors import UserError
from dst_t5x.engine import budget as budget_lib
from dst_t5x.engine import narrow
from dst_t5x.engine import trainer as trainer_lib
from dst_t5x.method import api as methods
from dst_t5x.method import reports
from dst_t5x.method import silos
from dst_t5x.runs import history
from dst_t5x.runs import summaries

PyTree = Any


_NOT_AVERAGED = (
  *reports.NORMS,
  'target_tokens',
  'refused_steps',
  'refused_in_row',
  'lost',
)


class Monitor:
  """Collects the metrics of steps, and reports them."""

  def __init__(
    self,
    folder: str | os.PathLike[str],
    projection: methods.Projection,
    state: trainer_lib.TrainState,
    seed: PyTree,
    steps: int,
    max_refused_steps: int = 1,
    budget: budget_lib.Budget | None = None,
  ) -> None:
    """Opens the files.

    Args:
      folder: MODEL_DIR.
      projection: the method.
      state: the state before the first step.
      seed: θ⁰ on the devices; () if the projection does not keep it.
      steps: the number of steps of the whole run.
      max_refused_steps: how many refused steps in a row end the run.
      budget: the method's budget.
    """
    first_step = int(state.step)
    self._summaries = summaries.Summaries(folder, first_step)
    self._summaries.text(
      first_step, {'config': f'```\n{binaries.operative_config()}\n```'}
    )
    self._progress = summaries.Progress(first_step, steps)
    self._has_warned = False
    self._parameters = 0 if budget is None else budget.parameters
    self._budget: dict[str, float] = {}
    if budget is not None:
      self._budget = {
        'free/total': float(budget.free),
        'free/fraction': budget.fraction,
        'free/file_bytes': float(budget.file_bytes),
      }
    self._window: list[dict[str, jax.Array]] = []
    self._unchecked: tuple[int, dict[str, jax.Array]] | None = None
    self._max_refused_steps = max_refused_steps
    self._last_step = steps
    self._refused_steps = int(state.refused_steps)
    # Whether the last checked step was refused.
    self.is_refused = False
    self._subset = (
      SubsetMonitor(
        projection,
        state.params,
        state.projection_state,
        seed,
        state.step.sharding,
      )
      if projection.constrains
      else None
    )

  def record(self, step: int, metrics: dict[str, jax.Array]) -> None:
    """Takes the metrics of a step, and checks the step before it.

    To check this step at once would make the device wait for the host.

    Raises:
      UserError: too many steps in a row were refused, before this one.
    """
    self.check()
    self._unchecked = (step, metrics)
    self._progress.advance()

  def check(self) -> None:
    """Checks the last recorded step.

    Raises:
      UserError: too many steps in a row were refused, or the last of the run;
        or the step changed more than the method says that it can.
    """
    if self._unchecked is None:
      return
    step, metrics = self._unchecked
    self._unchecked = None
    if lost := int(metrics.get('lost', 0)):
      raise UserError(
        f'step {step} changed {lost} parameters more than the method says in '
        '`free_at_most`, and SEED_DTYPE has no room for them: correct that, or '
        "use SEED_DTYPE = 'float32'; the checkpoints before are intact"
      )
    in_row = int(metrics['refused_in_row'])
    self.is_refused = in_row > 0
    self._refused_steps = int(metrics['refused_steps'])
    if not in_row:
      self._window.append(metrics)
      return
    loss = float(metrics['loss'])
    what = 'an update is not finite'
    if not math.isfinite(loss):
      what = f'the loss is {loss}'
    logging.warning('step %d is refused: %s', step, what)
    if in_row >= self._max_refused_steps or step == self._last_step:
      raise UserError(
        f'{what} at step {step}, and {in_row} in a row were refused: lower '
        'the learning rate, or look at the data; the checkpoints before are '
        'intact'
      )

  def log(
    self,
    step: int,
    state: trainer_lib.TrainState,
    projection: methods.Projection,
    seed: PyTree,
  ) -> None:
    """Writes the metrics since the last call.

    Args:
      step: the number of completed steps.
      state: the state after them.
      projection: the method, in its present phase.
      seed: θ⁰ on the devices; () if the projection does not keep it.
    """
    self.check()
    window = jax.device_get(self._window)
    self._window = []
    values = {'train/refused_steps': float(self._refused_steps)}
    if not window:
      self._summaries.scalars(step, values)
      return
    values |= {
      f'train/{name}': float(np.mean([w[name] for w in window]))
      for name in window[-1]
      if name not in _NOT_AVERAGED
    }
    values |= {f'train/{n}': float(window[-1][n]) for n in reports.NORMS}
    values |= self._budget
    if self._subset is not None:
      values |= self._subset.report(
        projection, state.params, state.projection_state, seed
      )
      if self._parameters:
        values['free/fraction'] = values['free/total'] / self._parameters
    self._warn_if_nothing_moves(step, window[-1])
    shown = {n: values[f'train/{n}'] for n in ('loss', 'accuracy')}
    rate = self._progress.report(shown)
    tokens = np.mean([w['target_tokens'] for w in window])
    values[metrics_file.RATE] = rate
    values['speed/target_tokens_per_second'] = rate * float(tokens)
    self._summaries.scalars(step, values)

  def _warn_if_nothing_moves(
    self, step: int, metrics: Mapping[str, np.ndarray]
  ) -> None:
    """Warns once if a step with a learning rate above 0 moved nothing."""
    rate = float(metrics['learning_rate'])
    if rate > 0 and metrics['update_norm'] == 0 and not self._has_warned:
      self._has_warned = True
      logging.warning(
        'NOTHING IS TRAINED: step %d moved no free parameter, though its '
        'learning rate was %.3g; look at DROPOUT_RATE (1 drops everything), '
        'LEARNING_RATE and what is frozen',
        step,
        rate,
      )

  def evaluated(self, step: int, results: Mapping[str, float]) -> None:
    """Writes the results of an evaluation."""
    self._summaries.scalars(step, results)
    logging.info(
      'evaluation at step %d: %s',
      step,
      '  '.join(f'{name} {value:.4g}' for name, value in results.items()),
    )

  def saved(self, step: int, report: history.Report | None) -> None:
    """Writes the report on a checkpoint's subset, if it has one."""
    if report is None:
      return
    if report.overlaps:
      self._summaries.scalars(step, report.overlaps)
    self._summaries.histogram(
      step,
      'distance/log10',
      report.distances,
      'Logarithms to base 10 of the distances of all free parameters.',
    )

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Excludes the time in the block from the rate of steps."""
    self.check()
    self._progress.pause()
    yield
    self._progress.restart()

  def close(self) -> None:
    """Flushes and closes the files."""
    self._progress.close()
    try:
      self._summaries.flush()
    finally:
      self._summaries.close()


class SubsetMonitor:
  """Reports the subset's size, its place and its churn."""

  def __init__(
    self,
    projection: methods.Projection,
    params: PyTree,
    projection_state: PyTree,
    seed: PyTree,
    replicated: Any,
  ) -> None:
    """Stores the mask of the subset, for the first report's churn.

    Args:
      projection: the method.
      params: the trained parameters before the first step, as held.
      projection_state: the projection's state at that step.
      seed: θ⁰; () if the projection does not keep it.
      replicated: the replicated sharding.
    """
    self._shapes = jax.eval_shape(narrow.Held(params, seed).theta)
    self._modules = silos.make_layout(self._shapes, 'per_module').names
    self._free = jax.jit(_pack)(projection, params, projection_state, seed)
    # Counts are replicated; masks are sharded as the parameters are.
    self._report = jax.jit(_report, out_shardings=(replicated, None))

  def report(
    self,
    projection: methods.Projection,
    params: PyTree,
    projection_state: PyTree,
    seed: PyTree,
  ) -> dict[str, float]:
    """Returns scalars: free parameters by module, churn, and the method's own.

    Churn is the share of free components that were not free at the last
    report. The arguments are those of `__init__`, of the present step.
    """
    counts, self._free = self._report(
      projection, params, projection_state, seed, self._free
    )
    free, new = jax.device_get((counts['free'], counts['new']))
    total = int(free.sum())
    values = projection.scalars(self._shapes, projection_state)
    values |= {
      'free/total': float(total),
      'free/churn': float(new.sum()) / total if total else math.nan,
    }
    for module, count in zip(self._modules, free, strict=True):
      values[f'free/{module}'] = float(count)
      values[f'share/{module}'] = float(count) / total if total else math.nan
    return values


def _pack(
  projection: methods.Projection, params: PyTree, state: PyTree, kept: PyTree
) -> PyTree:
  held = narrow.Held(params, kept)
  return reports.pack_free(held.theta(), held.seed_for(projection, state))


def _report(
  projection: methods.Projection,
  params: PyTree,
  state: PyTree,
  kept: PyTree,
  before: PyTree,
) -> tuple[dict[str, jax.Array], PyTree]:
  held = narrow.Held(params, kept)
  theta, seed = held.theta(), held.seed_for(projection, state)
  modules = silos.make_layout(theta, 'per_module')
  return reports.subset_report(modules, theta, seed, before)
