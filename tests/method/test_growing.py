"""ID3, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dst_t5x.method import api
from dst_t5x.method import growing

_STEPS = 3


@pytest.mark.parametrize(
  ('smoothing', 'exponent'), [(0.01, 2.0), (1.0, -1.0), (1.0, 0.0)]
)
def test_the_highest_of_d3_are_added(smoothing, exponent):
  random = np.random.default_rng(0)
  params, *gradients = (
    {'a': random.standard_normal((8, 9)).astype(np.float32)}
    for _ in range(_STEPS + 1)
  )
  method = growing.Id3(
    epsilon=0.25,  # 18 components.
    grow_steps=_STEPS,
    smoothing=smoothing,
    exponent=exponent,
  )
  frame = method.frame(params)
  tuning = api.Tuning(params, {}, method.init(params))
  choose = jax.jit(lambda t, g, i: method.choose(t, g, (), i))
  listed = np.zeros(72, bool)
  for step, gradient in enumerate(gradients):
    tuning = choose(tuning, gradient, jnp.int32(step))
    d3 = np.abs(gradient['a']) / (np.abs(params['a']) + smoothing) ** exponent
    new = np.argsort(np.where(listed, 0, d3.ravel()))[-6:]
    listed[new] = True
    masks = frame.masks(tuning.state.entries, params)
    np.testing.assert_array_equal(np.asarray(masks['a']).ravel(), listed)
