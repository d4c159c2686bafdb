"""Schedules, and AdaFactor layer by layer."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_t5

from dst_t5x.core import stacking
from dst_t5x.core.errors import UserError
from dst_t5x.engine import optimizers


@pytest.mark.parametrize(
  ('arguments', 'expected'),
  [
    ({}, {0: 0.5, 1000: 0.5}),
    ({'warmup_steps': 4}, {0: 0.0, 1: 0.125, 4: 0.5, 9: 0.5}),
    (
      {'decay': 'linear', 'decay_steps': 10},
      {0: 0.5, 5: 0.25, 10: 0.0, 99: 0.0},
    ),
    (
      {'warmup_steps': 2, 'decay': 'linear', 'decay_steps': 10},
      {1: 0.25, 2: 0.5, 6: 0.25, 10: 0.0},
    ),
    (
      {'warmup_steps': 2, 'decay': 'cosine', 'decay_steps': 10},
      {1: 0.25, 2: 0.5, 4: 0.25 * (1 + math.cos(math.pi / 4)), 10: 0.0},
    ),
    ({'decay': 'rsqrt'}, {0: 0.5, 3: 0.25, 99: 0.05}),
    (
      {'warmup_steps': 100, 'decay': 'rsqrt'},
      {50: 0.25, 100: 0.5, 400: 0.25, 10_000: 0.05},
    ),
  ],
)
def test_schedules(arguments, expected):
  schedule = optimizers.schedule(0.5, **arguments)
  found = {step: float(schedule(jnp.int32(step))) for step in expected}
  assert found == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ({'base': -0.1}, 'LEARNING_RATE must be at least 0 and finite; it is -0.1'),
    ({'base': 'abc'}, "LEARNING_RATE .* it is 'abc'"),
    ({'base': math.nan}, 'LEARNING_RATE .* it is nan'),
    (
      {'decay': 'cosin'},
      "LEARNING_RATE_DECAY .* 'cosin'; did you mean 'cosine'",
    ),
    ({'decay': 'linear'}, 'needs decay_steps above warmup_steps'),
    ({'decay': 'linear', 'decay_steps': 5, 'warmup_steps': 5}, 'are 5 and 5'),
    ({'warmup_steps': -1}, 'LEARNING_RATE_WARMUP_STEPS .* -1'),
  ],
)
def test_wrong_schedules(arguments, message):
  with pytest.raises(UserError, match=message):
    optimizers.schedule(**{'base': 0.1} | arguments)


def _trees(count):
  """Returns random trees with factored and unfactored tensors."""
  generator = np.random.default_rng(0)
  return [
    jax.tree.map(
      lambda leaf: generator.standard_normal(leaf.shape, np.float32),
      tiny_t5.shapes(),
    )
    for _ in range(count)
  ]


def _steps(optimizer, params, gradients):
  """Returns parameters and state after some steps."""
  state = jax.jit(optimizer.init)(params)
  step = jax.jit(lambda *arguments: _apply(optimizer.update, *arguments))
  for i, gradient in enumerate(gradients):
    params, state = step(gradient, state, params, i)
  return params, state


def _apply(update, gradient, state, params, step):
  updates, state = update(gradient, state, params, step)
  return optax.apply_updates(params, updates), state


def _adafactor(**arguments):
  return optimizers.adafactor(
    optimizers.schedule(0.01), min_dim_size_to_factor=8, **arguments
  )


@pytest.mark.parametrize('arguments', [{}, {'momentum': 0.9}])
def test_stacked_layers_are_treated_one_by_one(arguments):
  params, *gradients = _trees(4)
  plain, _ = _steps(_adafactor(**arguments), params, gradients)
  stack = stacking.stack_layers
  stacked, _ = _steps(
    _adafactor(**arguments), stack(params), [stack(g) for g in gradients]
  )
  found = tiny_t5.flat(stacking.unstack_layers(stacked))
  for path, expected in tiny_t5.flat(plain).items():
    np.testing.assert_allclose(
      found[path], expected, rtol=2e-6, atol=2e-7, err_msg=path
    )
    assert not np.array_equal(expected, tiny_t5.flat(params)[path])


def test_unstacked_layers_get_plain_adafactor():
  params, gradient = _trees(2)
  ours = _adafactor().make(0.01)
  plain = optax.adafactor(0.01, min_dim_size_to_factor=8)
  one, other = (
    jax.jit(update)(gradient, jax.jit(init)(params), params)[0]
    for init, update in (ours, plain)
  )
  jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.slow
def test_second_moments_do_not_depend_on_the_projection():
  """With the same gradients, they equal those of a run without projection."""
  params, *gradients = _trees(4)
  init, update = _adafactor().make(0.01)
  free, bound = init(params), init(params)
  projected = params
  for gradient in gradients:
    updates, free = update(gradient, free, params)
    params = optax.apply_updates(params, updates)
    # Everything back to where it was.
    _, bound = update(gradient, bound, projected)
  moments = [
    jax.tree.leaves((s[0].v_row, s[0].v_col, s[0].v)) for s in (free, bound)
  ]
  assert len(moments[0]) > 0
  for one, other in zip(*moments, strict=True):
    np.testing.assert_array_equal(one, other)
