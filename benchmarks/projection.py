"""How long the projection takes, in passes over the parameters.

  python benchmarks/projection.py --json projection.json
  python benchmarks/projection.py --work small base large giga --in-a-row 4

Trees shaped like T5 1.1, one tensor of 33.6M (`tensor`) and one of 1,074M
(`giga`) drift as in training. Each method projects the same θ′, its memory
donated as in training. Times are medians of the steps after --warm, or of the
first one ("cold"), and are given in passes: `new + seed` into fresh memory
("passes"), or in the place of `new` ("in_place_passes"). `gb_per_s` is what one
pass reads and writes, three numbers a component, over the method's time, and
`of_copy` is that over what a copy of 1 GiB on the device reaches.

An accelerator works while Python goes on. A call that is waited for therefore
takes as long as Python needs to start it, which may be longer than the work.
--in-a-row K starts K projections, of K steps' θ′, waits once and divides by K.

Methods: `exact`, compiled once for all ε; `iterative`, the paper's Algorithm 2
with J = 10; `sort`; and for a single tensor `quantile`, jnp.quantile, which is
not exact, and `top_k`, jax.lax.top_k. All but `exact` are measured at one ε;
`sort` and what follows it at the last step only.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tables
import works

from dst_t5x.method import distances
from dst_t5x.method import projection
from dst_t5x.method import reports
from dst_t5x.models import api

PyTree = Any

_EPSILONS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
_SILOS = ('none', 'per_module', 'per_module_and_layer')
_TENSORS = {'tensor': (32768, 1024), 'giga': (32768, 32768)}
_TREES = ('tiny', 'small', 'base', 'large')
_SLOW = ('sort', 'quantile', 'top_k')


def shapes_of(work: str) -> PyTree:
  """Returns the shapes of a tensor, or of T5 1.1's parameters."""
  if work in _TENSORS:
    return {'w': {'kernel': jax.ShapeDtypeStruct(_TENSORS[work], np.float32)}}
  return api.shapes(works.network_of(f't5_1_1_{work}'))


class Drift:
  """θ′ of each step: what was kept, moved on, with noise."""

  def __init__(self, seed: PyTree) -> None:
    keys = jax.random.split(jax.random.key(1), 3)
    self._directions = [works.normal(seed, key, 1.0) for key in keys]
    self._random = np.random.default_rng(1)
    self._move = jax.jit(_moved)

  def __call__(self, params: PyTree) -> PyTree:
    """Returns θ′ of the next step."""
    weights = np.float32([1, *(0.4 * self._random.standard_normal(2))])
    return jax.block_until_ready(
      self._move(params, self._directions, 1e-3 * weights)
    )


def _moved(params: PyTree, directions: list[PyTree], weights: PyTree) -> PyTree:
  return jax.tree.map(
    lambda p, *d: p + sum(w * x for w, x in zip(weights, d, strict=True)),
    params,
    *directions,
  )


def _add(new: PyTree, seed: PyTree, state: Any) -> Any:
  return jax.tree.map(jnp.add, new, seed), state


def _quantile(
  new: PyTree, seed: PyTree, state: Any, program: Any, epsilon: float
) -> Any:
  """What a first implementation does, for a tree of one tensor (App. C)."""
  del program
  (a,), (b,) = jax.tree.leaves(new), jax.tree.leaves(seed)
  distance = distances.inverse_relative(a, b)
  kept = jnp.where(distance > jnp.quantile(distance, 1 - epsilon), a, b)
  return jax.tree.unflatten(jax.tree.structure(new), [kept]), state


def _top_k(
  new: PyTree, seed: PyTree, state: Any, program: Any, epsilon: float
) -> Any:
  """Resets all but the largest distances, for a tree of one tensor."""
  del program
  (a,), (b,) = jax.tree.leaves(new), jax.tree.leaves(seed)
  flat, original = a.ravel(), b.ravel()
  distance = distances.inverse_relative(flat, original)
  _, free = jax.lax.top_k(distance, max(1, round(epsilon * flat.size)))
  kept = original.at[free].set(flat[free], unique_indices=True)
  return jax.tree.unflatten(
    jax.tree.structure(new), [kept.reshape(a.shape)]
  ), state


def _exact(new: PyTree, seed: PyTree, state: Any, program: Any) -> Any:
  return program.apply(new, seed, state)


def _unprepared(method: projection.SubsetProjection) -> Callable[..., Any]:
  return lambda new, seed, state, program: method.apply(new, seed, state)


_copy = jax.jit(functools.partial(jax.tree.map, jnp.copy))


class Method:
  """One way to project, compiled, with its state and its times."""

  def __init__(
    self,
    apply: Callable[..., Any],
    seed: PyTree,
    state: Any,
    *more: Any,
    donate: bool = True,
  ) -> None:
    jitted = jax.jit(apply, donate_argnums=0 if donate else ())
    self.compile_s, self._apply = tables.seconds(
      jitted.lower(seed, seed, state, *more).compile
    )
    self.begin(state, *more)

  def begin(self, state: Any, *more: Any) -> None:
    """Forgets all times, and begins with a state, and arguments after it."""
    self._state, self._more = state, more
    self.times: list[float] = []

  def __call__(self, news: Sequence[PyTree], seed: PyTree) -> PyTree:
    """Projects each θ′, which stays as it is; returns the last θᵗ⁺¹.

    The copies that are donated are made before the clock starts.
    """
    copies = [jax.block_until_ready(_copy(new)) for new in news]
    taken, params = tables.seconds(self._in_a_row, copies, seed)
    self.times.append(taken / len(news))
    return params

  def _in_a_row(self, copies: list[PyTree], seed: PyTree) -> PyTree:
    params = None
    while copies:
      # Nothing holds what is donated, or what the call before returned.
      params, self._state = self._apply(
        copies.pop(0), seed, self._state, *self._more
      )
    return params


def measure(
  work: str, seed: PyTree, silos: str, options: argparse.Namespace
) -> Iterator[list[tables.Row]]:
  """Yields the rows of one work and siloing, for one ε after the other."""
  passes = {
    'passes': Method(_add, seed, (), donate=False),
    'in_place_passes': Method(_add, seed, ()),
  }
  drift = Drift(seed)
  exact = None
  for epsilon in options.epsilon:
    method = projection.SubsetProjection(epsilon, silos=silos)
    # As in training: ε is an argument of what is compiled.
    arguments = method.init(seed), jax.device_put(method.prepare(seed))
    exact = exact or Method(_exact, seed, *arguments)
    methods = {'exact': exact}
    if epsilon == options.rivals_epsilon:
      methods |= dict(_rivals(method, seed, options.rivals))
    for one in passes.values():
      one.begin(())
    exact.begin(*arguments)
    errors = _run(method, {**passes, **methods}, seed, drift, options)
    yield [
      {'work': work, 'silos': silos, 'epsilon': epsilon, **row}
      for row in _rows(seed, passes, methods, errors, options.warm)
    ]


def _rivals(
  method: projection.SubsetProjection, seed: PyTree, names: Sequence[str]
) -> Iterator[tuple[str, Method]]:
  """Yields the methods that `exact` is compared with."""
  for name in names:
    if name in ('iterative', 'sort'):
      other = projection.SubsetProjection(
        method.epsilon, silos=method.silos, threshold=name
      )
      yield name, Method(_unprepared(other), seed, other.init(seed), ())
    elif len(jax.tree.leaves(seed)) == 1:
      apply = {'quantile': _quantile, 'top_k': _top_k}[name]
      one = functools.partial(apply, epsilon=method.epsilon)
      yield name, Method(one, seed, (), ())


def _run(
  method: projection.SubsetProjection,
  methods: dict[str, Method],
  seed: PyTree,
  drift: Drift,
  options: argparse.Namespace,
) -> dict[str, int]:
  """Lets all methods project a run's θ′; returns errors of the budget."""
  layout = method.layout(seed)
  guide = methods['exact']
  # The same projection makes the run, and is timed afterwards.
  move, state = guide._apply, guide._state
  params = _copy(seed)
  errors: dict[str, int] = {}
  groups = [1] * options.warm + [options.in_a_row] * options.steps
  for i, size in enumerate(groups):
    news = []
    for _ in range(size):
      news.append(drift(params))
      params, state = move(_copy(news[-1]), seed, state, *guide._more)
    for name, one in methods.items():
      if name not in _SLOW or i == len(groups) - 1:
        projected = one(news, seed)
        if i == len(groups) - 1 and name not in ('passes', 'in_place_passes'):
          errors[name] = _budget_error(layout, projected, seed, method.epsilon)
  return errors


def _rows(
  seed: PyTree,
  passes: dict[str, Method],
  methods: dict[str, Method],
  errors: dict[str, int],
  warm: int,
) -> Iterator[tables.Row]:
  """Yields a row for each method, phase and metric."""
  moved = 3 * sum(leaf.nbytes for leaf in jax.tree.leaves(seed)) / 1e9
  units = tables.medians({name: m.times[warm:] for name, m in passes.items()})
  phases: list[tuple[str, str, Sequence[float], dict[str, Any]]] = [
    ('pass', 'warm', passes['passes'].times[warm:], {}),
    ('in_place_pass', 'warm', passes['in_place_passes'].times[warm:], {}),
  ]
  for name, one in methods.items():
    more = {
      'budget_error': (errors[name], 'components'),
      'compile_s': (one.compile_s, 's'),
    }
    if name not in _SLOW and warm:
      phases.append((name, 'cold', one.times[:1], {}))
    is_slow = name in _SLOW
    phases.append((name, 'warm', one.times[0 if is_slow else warm :], more))
  for name, phase, times, more in phases:
    taken = tables.medians({'': times})['']
    rate = moved / taken
    values = {unit: (taken / s, 'passes') for unit, s in units.items()} | {
      'seconds': (taken, 's'),
      'gb_per_s': (rate, 'GB/s'),
      'of_copy': (rate / tables.copy_bandwidth(), ''),
      **more,
    }
    for metric, (value, unit) in values.items():
      yield {'method': name, 'phase': phase, 'metric': metric, 'value': value,
             'unit': unit}  # fmt: skip


_counts = jax.jit(
  lambda layout, params, seed: reports.subset_report(
    layout, params, seed, reports.pack_free(seed, seed)
  )[0]['free'],
  static_argnums=0,
)


def _budget_error(
  layout: Any, params: PyTree, seed: PyTree, epsilon: float
) -> int:
  """Returns how many components are free too many, or too few, of all silos."""
  free = np.asarray(_counts(layout, params, seed), np.int64)
  return int(np.abs(free - np.asarray(layout.budgets(epsilon))).sum())


def _wide(rows: Sequence[tables.Row]) -> list[tables.Row]:
  """Returns one row a method and phase, metrics beside each other."""
  keys = ('work', 'silos', 'epsilon', 'method', 'phase')
  merged: dict[tuple[Any, ...], tables.Row] = {}
  for row in rows:
    key = tuple(row[k] for k in keys)
    merged.setdefault(key, dict(zip(keys, key, strict=True)))
    merged[key][row['metric']] = row['value']
  return list(merged.values())


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add('--json', metavar='FILE', help='write the rows here')
  add('--work', nargs='+', default=['tensor', 'small'],
      choices=[*_TREES, *_TENSORS])  # fmt: skip
  add('--silos', nargs='+', default=_SILOS, choices=_SILOS)
  add('--epsilon', nargs='+', type=float, default=_EPSILONS)
  add('--warm', type=int, default=10, help='steps not timed')
  add('--steps', type=int, default=30, help='times to measure')
  add('--in-a-row', type=int, default=1, help='projections of one time')
  add('--rivals', nargs='*', default=['iterative', *_SLOW],
      choices=['iterative', *_SLOW], help='what to compare with')  # fmt: skip
  add('--rivals-epsilon', type=float, default=1e-2, help='where it is measured')
  return parser


def main() -> None:
  """Measures, prints, writes."""
  parser = _parser()
  options = parser.parse_args()
  if min(options.steps, options.in_a_row) < 1 or options.warm < 0:
    parser.error('--steps and --in-a-row must be above 0, --warm 0 or more')
  rows: list[tables.Row] = [
    {
      'metric': 'copy_gb_per_s',
      'value': tables.copy_bandwidth(),
      'unit': 'GB/s',
    }
  ]
  tables.write_json(options.json, rows)
  print(f'a copy on the device: {tables.copy_bandwidth():.4g} GB/s', flush=True)
  for work in options.work:
    seed = works.normal(shapes_of(work), jax.random.key(0))
    # A tensor is one silo in any case.
    for silos in options.silos if work in _TREES else options.silos[-1:]:
      for found in measure(work, seed, silos, options):
        rows += found
        tables.write_json(options.json, rows)
        tables.show(
          _wide(found),
          ('work', 'silos', 'epsilon', 'method', 'phase', 'in_place_passes',
           'passes', 'seconds', 'gb_per_s', 'of_copy', 'budget_error',
           'compile_s'),
        )  # fmt: skip


if __name__ == '__main__':
  main()
