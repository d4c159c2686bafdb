"""The keys of a training state's arrays in a checkpoint."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dst_t5x.checkpoints import state_keys
from dst_t5x.engine import optimizers
from dst_t5x.method import projection

# Two stacks of unequal depth, and a path that ends another one.
PARAMS = {
  'a': {
    'layers': {'kernel': np.ones((2, 4, 3), np.float32)},
    'scale': np.ones(3, np.float32),
  },
  'b': {'layers': {'kernel': np.ones((1, 4, 3), np.float32)}},
  'kernel': np.ones((4, 3), np.float32),
  'scale': np.ones(5, np.float32),
}


def _adafactor(momentum=None):
  return optimizers.adafactor(
    optimizers.schedule(0.1), momentum=momentum, min_dim_size_to_factor=2
  )


@pytest.mark.parametrize(
  'make',
  [
    lambda: _adafactor(momentum=0.9),
    lambda: optax.adam(0.1),
    lambda: optax.sgd(0.1),
    lambda: optax.MultiSteps(optax.adamw(0.1), 2),
  ],
)
def test_flatten_is_undone_by_unflatten(make):
  state = make().init(PARAMS)
  numbered = jax.tree.unflatten(
    jax.tree.structure(state), range(len(jax.tree.leaves(state)))
  )
  whole = {
    'refused_steps': 7,
    'projection': projection.ProjectionState(3, 4, [5, {}, (None, 6)]),
    'optimizer': numbered,
  }
  flat = state_keys.flatten(whole, PARAMS)
  assert len(flat) == len(jax.tree.leaves(whole))
  assert state_keys.unflatten(whole, PARAMS, flat) == whole


def test_keys_are_ours():
  state = _adafactor().init(PARAMS)
  flat = state_keys.flatten(
    {
      'optimizer': state,
      'projection': projection.ProjectionState(1, 2, 3),
      'refused_steps': 0,
    },
    PARAMS,
  )
  paths = ['a.layers.kernel', 'a.scale', 'b.layers.kernel', 'kernel', 'scale']
  assert sorted(flat) == sorted(
    [
      *(f'optimizer.{path}.{k}' for path in paths for k in range(3)),
      *(f'optimizer.{k}' for k in range(3)),  # Counts, of each group.
      *(f'projection.{n}' for n in ('thresholds', 'drift', 'passes')),
      'refused_steps',
    ]
  )
  rows, columns = (flat[f'optimizer.a.layers.kernel.{k}'] for k in range(2))
  assert (rows.shape, columns.shape) == ((2, 3), (2, 4))
  assert flat['optimizer.scale.2'].shape == (5,)


class _Renamed(NamedTuple):
  """Adam's state, as another release of Optax could define it."""

  steps: Any
  first: Any
  second: Any


def _later_adam():
  adam = optax.scale_by_adam()

  def init(params):
    return _Renamed(*adam.init(params))

  def update(updates, state, params=None):
    updates, state = adam.update(
      updates, optax.ScaleByAdamState(*state), params
    )
    return updates, _Renamed(*state)

  return optax.GradientTransformation(init, update)


def test_another_optax_goes_on():
  """Fields have other names, and the state is wrapped in another one."""
  ours = optax.chain(optax.scale_by_adam(), optax.scale(-0.1))
  theirs = optax.chain(
    optax.identity(), optax.chain(_later_adam(), optax.scale(-0.1))
  )

  def steps(optimizer, params, state, number):
    for _ in range(number):
      gradients = jax.tree.map(jnp.sin, params)
      updates, state = optimizer.update(gradients, state, params)
      params = optax.apply_updates(params, updates)
    return params, state

  whole, _ = steps(ours, PARAMS, ours.init(PARAMS), 4)
  params, state = steps(ours, PARAMS, ours.init(PARAMS), 2)
  flat = state_keys.flatten({'optimizer': state}, params)
  like = {'optimizer': jax.eval_shape(theirs.init, params)}
  state = state_keys.unflatten(like, params, flat)['optimizer']
  assert isinstance(state[1][0], _Renamed)
  resumed, _ = steps(theirs, params, state, 2)
  jax.tree.map(np.testing.assert_array_equal, resumed, whole)
