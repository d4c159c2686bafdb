"""The cost of a sweep: runs, steps, estimated device-hours."""

from collections.abc import Mapping, Sequence
import dataclasses
import statistics
import timeit
from typing import Any

from dst_t5x.launch import grid
from dst_t5x.launch import states
from dst_t5x.planning import topologies

# Assumed share of the peak rate that training reaches.
_UTILIZATION = 0.4
_KEYS = ('model', 'task', 'method')
_SECONDS_PER_HOUR = 3600


@dataclasses.dataclass
class _Row:
  """Runs of one model, task and method.

  Attributes:
    runs: number of runs.
    to_go: number of unfinished runs.
    steps: steps that remain.
    hours: hours of one device for these steps.
    mark: an asterisk if the hours are estimated from finished runs.
  """

  runs: int = 0
  to_go: int = 0
  steps: int = 0
  hours: float = 0.0
  mark: str = ''


def report(
  run_states: Mapping[str, states.State],
  work: Mapping[str, Mapping[str, Any]],
  topology: str,
) -> str:
  """Returns a table with one row for each model, task and method.

  Args:
    run_states: name -> state of the run.
    work: name -> `planning.work` of the run.
    topology: the devices of a run, or `cpu`.

  Raises:
    UserError: there is no such topology.
  """
  devices = topologies.parse(topology)
  rate = _UTILIZATION * (devices.accelerator.flops or _rate_here())
  groups: dict[str, list[str]] = {}
  for name, state in run_states.items():
    words = (grid.stem(state.settings.get(key, '')) for key in _KEYS)
    groups.setdefault(' '.join(filter(None, words)), []).append(name)
  rows = {
    title: _row([(run_states[name], work[name]) for name in names], rate)
    for title, names in groups.items()
  }
  rows['all'] = _Row(
    sum(row.runs for row in rows.values()),
    sum(row.to_go for row in rows.values()),
    sum(row.steps for row in rows.values()),
    sum(row.hours for row in rows.values()),
  )
  width = max(map(len, rows))
  titles = f'{"runs":>6} {"to go":>6} {"steps":>11} {"device-hours":>13}'
  lines = [f'{"":{width}}  {titles}']
  lines += [
    f'{title:{width}}  {row.runs:6} {row.to_go:6} {row.steps:11,} '
    f'{row.hours:13,.3g}{row.mark}'
    for title, row in rows.items()
  ]
  is_measured = any(row.mark for row in rows.values())
  return '\n'.join([*lines, *_notes(devices, rate, is_measured)])


def _row(
  runs: Sequence[tuple[states.State, Mapping[str, Any]]], rate: float
) -> _Row:
  """Returns the row of some runs, given a rate in operations per second."""
  per_step = _measured([state for state, _ in runs])
  row = _Row(runs=len(runs), mark='' if per_step is None else '*')
  for state, work in runs:
    if state.state != states.FINISHED:
      steps = work['train_steps'] - state.step
      seconds = per_step or work['flops_per_step'] / rate
      row.to_go += 1
      row.steps += steps
      row.hours += steps * seconds / _SECONDS_PER_HOUR
  return row


def _notes(
  devices: topologies.Topology, rate: float, is_measured: bool
) -> list[str]:
  """Returns notes on how the hours were estimated."""
  peak = (
    f'the peak of {devices.kind}'
    if devices.accelerator.flops
    else 'what a product of matrices reaches on this machine'
  )
  notes = [
    f'Hours: the operations of training at {_UTILIZATION:.0%} of {peak}, '
    f'{rate / 1e12:.3g}e12 a second;',
    'neither compilation nor evaluation, which are most of a short run.',
  ]
  if devices.devices > 1:
    notes.append(
      f'A run has {devices.devices} devices: divide by that for its hours.'
    )
  if is_measured:
    notes.append('*: by what its finished runs took, all in all.')
  return notes


def _measured(run_states: Sequence[states.State]) -> float | None:
  """Returns the median of seconds per step over uninterrupted runs."""
  taken = [
    state.seconds / state.step
    for state in run_states
    if state.state == states.FINISHED and state.seconds and state.step
  ]
  return statistics.median(taken) if taken else None


def _rate_here(size: int = 768) -> float:
  """Returns this machine's rate of float32 matrix products, in operations/s."""
  import numpy as np

  a = np.ones((size, size), np.float32)
  return 2 * size**3 / min(timeit.repeat(lambda: a @ a, number=1, repeat=5))
