"""How long the projection takes, in passes over the parameters.

  python benchmarks/projection.py --json projection.json

A tree shaped like T5 1.1 Small (77M parameters) and one tensor of 33.6M drift
for 40 steps, as in training. In one interleaved run each method projects the
same θ′, its memory donated as in training. Times are medians of the steps from
the eleventh on ("warm"), or of the first one ("cold"), and are given in passes:
`new + seed` into fresh memory ("passes"), or in the place of `new`
("in_place_passes"), which is the limit of the memory.

Methods: `exact`; `iterative`, the paper's Algorithm 2 with J = 10; `sort`; and
for the single tensor `quantile`, jnp.quantile, which is not exact. The last two
take as long for every ε and are measured at one.
"""

import argparse
from collections import defaultdict
from collections.abc import Callable, Sequence
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tables

from dst_t5x.method import distances
from dst_t5x.method import projection
from dst_t5x.method import reports

PyTree = Any

_EPSILONS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
_SILOS = ('none', 'per_module', 'per_module_and_layer')
_WARM = 10
_SLOW_REPEATS = 1


def small_tree(random: np.random.Generator) -> PyTree:
  """Returns a tree of the shapes of T5 1.1 Small."""

  def tensor(*shape: int) -> jax.Array:
    return jnp.asarray(0.05 * random.standard_normal(shape, np.float32))

  def attention() -> PyTree:
    inner = {k: {'kernel': tensor(512, 384)} for k in ('query', 'key', 'value')}
    return inner | {'out': {'kernel': tensor(384, 512)}}

  def mlp() -> PyTree:
    wide = {k: {'kernel': tensor(512, 1024)} for k in ('wi_0', 'wi_1')}
    return wide | {'wo': {'kernel': tensor(1024, 512)}}

  def norms(*names: str) -> PyTree:
    return {f'pre_{name}_layer_norm': {'scale': tensor(512)} for name in names}

  def stack(layer: Callable[[], PyTree], name: str) -> PyTree:
    return {f'layers_{i}': layer() for i in range(8)} | {
      f'{name}_norm': {'scale': tensor(512)},
      'relpos_bias': {'rel_embedding': tensor(6, 32)},
    }

  encoder = stack(
    lambda: (
      {'attention': attention(), 'mlp': mlp()} | norms('attention', 'mlp')
    ),
    'encoder',
  )
  decoder = stack(
    lambda: (
      {
        'self_attention': attention(),
        'encoder_decoder_attention': attention(),
        'mlp': mlp(),
      }
      | norms('self_attention', 'cross_attention', 'mlp')
    ),
    'decoder',
  )
  return {
    'token_embedder': {'embedding': tensor(32128, 512)},
    'encoder': encoder,
    'decoder': decoder | {'logits_dense': {'kernel': tensor(512, 32128)}},
  }


def one_tensor(random: np.random.Generator) -> PyTree:
  """Returns a single tensor of 33.6M."""
  values = random.standard_normal((32768, 1024), np.float32)
  return {'w': {'kernel': jnp.asarray(0.05 * values)}}


class Drift:
  """θ′ of each step: what was kept, moved on, with noise."""

  def __init__(self, seed: PyTree) -> None:
    random = np.random.default_rng(1)
    self._directions = [
      jax.tree.map(
        lambda x: jnp.asarray(random.standard_normal(x.shape, np.float32)), seed
      )
      for _ in range(3)
    ]
    self._random = random
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


def _add(new: PyTree, seed: PyTree) -> PyTree:
  return jax.tree.map(jnp.add, new, seed)


_copy = jax.jit(functools.partial(jax.tree.map, jnp.copy))


def _quantile(new: PyTree, seed: PyTree, state: Any, epsilon: float) -> Any:
  """What a first implementation does, for a tree of one tensor (App. C)."""
  (path, a), b = jax.tree.leaves_with_path(new)[0], jax.tree.leaves(seed)[0]
  del path
  distance = distances.inverse_relative(a, b)
  kept = jnp.where(distance > jnp.quantile(distance, 1 - epsilon), a, b)
  return jax.tree.unflatten(jax.tree.structure(new), [kept]), state


class Method:
  """One way to project, compiled, with its state and its times."""

  def __init__(
    self, apply: Callable[..., Any], seed: PyTree, state: Any, every_step: bool
  ) -> None:
    self.every_step = every_step
    start = time.perf_counter()
    jitted = jax.jit(apply, donate_argnums=0)
    self._apply = jitted.lower(seed, seed, state).compile()
    self.compile_s = time.perf_counter() - start
    self._state = state
    self.times: list[float] = []

  def __call__(self, new: PyTree, seed: PyTree) -> PyTree:
    """Returns θᵗ⁺¹; θ′ stays as it is, and making its copy is not timed."""
    new = jax.block_until_ready(_copy(new))
    taken, (params, self._state) = tables.seconds(
      self._apply, new, seed, self._state
    )
    self.times.append(taken)
    return params


def measure(
  work: str, seed: PyTree, silos: str, epsilon: float, steps: int, slow: bool
) -> list[tables.Row]:
  """Returns the rows of one setting.

  Args:
    work: what the seed is called.
    seed: θ⁰.
    silos: a siloing.
    epsilon: ε.
    steps: how long to drift.
    slow: whether to measure what sorts, too.
  """
  choices = {'exact': {}, 'iterative': {'threshold': 'iterative'}}
  if slow:
    choices['sort'] = {'threshold': 'sort'}
  methods = {}
  for name, choice in choices.items():
    method = projection.SubsetProjection(epsilon, silos=silos, **choice)
    methods[name] = Method(
      method.apply, seed, method.init(seed), every_step=name != 'sort'
    )
  if slow and len(jax.tree.leaves(seed)) == 1:
    methods['quantile'] = Method(
      functools.partial(_quantile, epsilon=epsilon), seed, (), every_step=False
    )
  layout = projection.SubsetProjection(epsilon, silos=silos).layout(seed)
  fresh, in_place = jax.jit(_add), jax.jit(_add, donate_argnums=0)
  passes: dict[str, list[float]] = defaultdict(list)
  drift = Drift(seed)
  params = _copy(seed)
  errors: dict[str, int] = {}
  for step in range(steps):
    new = drift(params)
    passes['passes'].append(tables.seconds(fresh, new, seed)[0])
    copy = jax.block_until_ready(_copy(new))
    passes['in_place_passes'].append(tables.seconds(in_place, copy, seed)[0])
    for name, method in methods.items():
      if method.every_step or step >= steps - _SLOW_REPEATS:
        projected = method(new, seed)
        errors[name] = _budget_error(layout, projected, seed, epsilon)
        if name == 'exact':
          params = projected
  units = tables.medians(
    {name: series[_WARM:] for name, series in passes.items()}
  )
  rows = []
  for name, method in methods.items():
    phases = {'warm': method.times[-(steps - _WARM) :]}
    if method.every_step:
      phases = {'cold': method.times[:1], 'warm': method.times[_WARM:]}
    for phase, times in phases.items():
      taken = tables.medians({'time': times})['time']
      values = {unit: (taken / s, 'passes') for unit, s in units.items()}
      if phase == 'warm':
        values['seconds'] = (taken, 's')
        values['budget_error'] = (errors[name], 'components')
        values['compile_s'] = (method.compile_s, 's')
      rows += [
        {
          'work': work,
          'silos': silos,
          'epsilon': epsilon,
          'method': name,
          'phase': phase,
          'metric': metric,
          'value': value,
          'unit': unit,
        }
        for metric, (value, unit) in values.items()
      ]
  return rows


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


def main() -> None:
  """Measures, prints, writes."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--json', metavar='FILE', help='write the rows here')
  parser.add_argument('--work', nargs='+', default=['tensor', 'small'])
  parser.add_argument('--silos', nargs='+', default=_SILOS)
  parser.add_argument('--epsilon', nargs='+', type=float, default=_EPSILONS)
  parser.add_argument('--steps', type=int, default=40)
  parser.add_argument(
    '--slow-epsilon', type=float, default=1e-2, help='where sorting is measured'
  )
  options = parser.parse_args()
  if options.steps <= _WARM + 1:
    parser.error(f'--steps must be above {_WARM + 1}')
  rows: list[tables.Row] = []
  makers = {'small': small_tree, 'tensor': one_tensor}
  for work in options.work:
    if work not in makers:
      parser.error(f'--work: no {work!r} (known: {", ".join(makers)})')
    seed = makers[work](np.random.default_rng(0))
    for silos in options.silos if work == 'small' else options.silos[-1:]:
      for epsilon in options.epsilon:
        slow = epsilon == options.slow_epsilon
        found = measure(work, seed, silos, epsilon, options.steps, slow)
        rows += found
        tables.write_json(options.json, rows)
        tables.show(
          _wide(found),
          ('work', 'silos', 'epsilon', 'method', 'phase', 'in_place_passes',
           'passes', 'seconds', 'budget_error', 'compile_s'),
        )  # fmt: skip


if __name__ == '__main__':
  main()
