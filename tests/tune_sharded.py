"""Tunes lists on one device and on a mesh of eight; prints what came of it.

A row of JSON for each method: whether all results are equal bit for bit, and
what the program of a step sends between devices. A process of its own, because
JAX has to be told the number of devices before it starts.
"""

import functools
import json

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
import project_sharded

from dst_t5x.method import api
from dst_t5x.method import fixed
from dst_t5x.method import growing
from dst_t5x.method import reselecting
from dst_t5x.method import spiel
from dst_t5x.method import two_phases

_EPSILON = 0.1
_STEPS = 5
_METHODS = {
  'shira_random': (fixed.ShiraRandom(_EPSILON), AxisType.Auto),
  'pafi': (fixed.Pafi(_EPSILON), AxisType.Explicit),
  'shira_snip': (fixed.ShiraSnip(_EPSILON, score_steps=2), AxisType.Auto),
  'lt_sft': (two_phases.LtSft(_EPSILON, first_steps=2), AxisType.Auto),
  'prune_after': (two_phases.PruneAfter(_EPSILON, after=5), AxisType.Auto),
  'id3': (growing.Id3(_EPSILON, grow_steps=4), AxisType.Auto),
  'gasdu': (reselecting.Gasdu(_EPSILON, interval=2), AxisType.Auto),
  'nano_adam': (reselecting.NanoAdam(_EPSILON, interval=2), AxisType.Auto),
  'spiel': (
    spiel.Spiel(_EPSILON, interval=2, accumulate=1, steps=9),
    AxisType.Auto,
  ),
  'lift': (reselecting.Lift(_EPSILON, interval=2, rank=2), AxisType.Auto),
}


def _tensors(random):
  return project_sharded._map(
    lambda leaf: random.standard_normal(leaf[0]).astype(np.float32)
  )


def _step(method, tuning, gradients, seed, step):
  """Returns the state after a step with momentum."""
  chosen = method.choose(tuning, gradients, seed, step)
  gradients = method.tuned(gradients, chosen.state)
  before = method.tuned(chosen.params, chosen.state)
  moments = jax.tree.map(lambda m, g: 0.9 * m + g, chosen.opt_state, gradients)
  tuned = jax.tree.map(lambda p, m: p - 0.1 * m, before, moments)
  params = method.put(chosen.params, tuned, chosen.state)
  theta_0 = method.seed(chosen.params, seed, chosen.state)
  after = api.Tuning(params, moments, chosen.state)
  return method.settle(after, theta_0, step)


def _begin(method, params, state):
  tuned = method.tuned(params, state)
  return api.Tuning(params, jax.tree.map(jnp.zeros_like, tuned), state)


def _run(whole, place):
  """Makes the steps; returns the end, and what lowers the last step."""
  random = np.random.default_rng(0)
  seed = place(_tensors(random))
  method = whole.at(0)
  tuning = jax.jit(lambda p: _begin(method, p, method.init(p)))(seed)
  for i in range(_STEPS):
    gradients = place(_tensors(random))
    if i in whole.phase_starts:
      step = jax.jit(lambda *args, m=method: _step(m, *args))
    arguments = tuning, gradients, seed, jnp.int32(i)
    tuning = step(*arguments)
    if i + 1 in whole.phase_starts:
      method = whole.at(i + 1)
      enter = jax.jit(
        lambda t, s, m=method: _begin(m, *m.enter(t.params, s, t.state))
      )
      tuning = enter(tuning, seed)
  return tuning, functools.partial(step.lower, *arguments)


def _row(name, method, axis_type):
  mesh = jax.make_mesh((4, 2), ('data', 'model'), axis_types=(axis_type,) * 2)
  shardings = project_sharded._map(
    lambda leaf: NamedSharding(mesh, PartitionSpec(*leaf[1]))
  )
  one, _ = _run(method, lambda tree: tree)
  with jax.set_mesh(mesh):
    many, lower = _run(method, lambda tree: jax.device_put(tree, shardings))
    sent = project_sharded._sent(lower().compile().as_text())
  is_equal = [
    np.asarray(a).tobytes() == np.asarray(b).tobytes()
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True)
  ]
  seed = _tensors(np.random.default_rng(0))
  return {
    'name': name,
    'is_equal': all(is_equal),
    'sent': sent,
    'room': method.free(seed),
    'free': sum(
      int((np.asarray(a) != b).sum())
      for a, b in zip(
        jax.tree.leaves(many.params), jax.tree.leaves(seed), strict=True
      )
    ),
    'size': sum(x.size for x in jax.tree.leaves(seed)),
  }


def main() -> None:
  """Prints the rows."""
  assert len(jax.devices()) == 8
  for name, setting in _METHODS.items():
    print(json.dumps(_row(name, *setting)), flush=True)


if __name__ == '__main__':
  main()
