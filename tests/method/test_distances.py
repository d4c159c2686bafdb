"""Distances against values computed by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from dst_t5x.method import distances

INF = float('inf')


@pytest.mark.parametrize(
  ('name', 'new', 'seed', 'expected'),
  [
    ('absolute', 1.5, 1.0, 0.5),
    ('absolute', -1.0, 1.0, 2.0),
    ('absolute', -0.0, 0.0, 0.0),
    ('absolute', INF, 1.0, INF),
    ('relative', 1.5, -0.5, 4.0),
    ('relative', 1.0, 0.0, INF),
    ('relative', 0.0, 0.0, 0.0),
    ('relative', -0.0, 0.0, 0.0),
    ('relative', -INF, -2.0, INF),
    ('inverse_relative', 1.5, -0.5, 1.0),
    ('inverse_relative', -3.0, -2.0, 2.0),
    ('inverse_relative', 7.0, 0.0, 0.0),
    ('inverse_relative', 0.0, -0.0, 0.0),
    ('inverse_relative', 3e38, -1e3, INF),
  ],
)
def test_golden(name, new, seed, expected):
  distance = jax.jit(distances.DISTANCES[name])
  result = distance(jnp.float32(new), jnp.float32(seed))
  assert result.dtype == np.float32
  assert result.tobytes() == np.float32(expected).tobytes()


@pytest.mark.parametrize('name', distances.DISTANCES)
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_against_the_reference(name, dtype):
  r = np.random.default_rng(0)
  new, seed = np.asarray(r.standard_normal((2, 1000)), dtype)
  seed[:10] = 0
  new[5:20] = seed[5:20]
  result = jax.jit(distances.DISTANCES[name])(new, seed)
  expected = reference.distance(name, new, seed)
  np.testing.assert_array_equal(result, expected)
  assert not np.signbit(result).any()


@pytest.mark.parametrize('name', distances.DISTANCES)
def test_nan_shows_and_has_no_sign(name):
  new = jnp.float32([np.nan, -np.nan])
  result = np.asarray(distances.DISTANCES[name](new, jnp.ones(2)))
  assert np.isnan(result).all()
  assert (reference.bits(result) > reference.bits(np.float32(INF))).all()


def test_random_scores():
  positions = jnp.arange(2**16, dtype=jnp.uint32)
  key = jnp.uint32(3)
  scores = np.asarray(distances.random_scores(positions, key))
  assert scores.min() >= 1
  assert scores.max() < 2**31
  # Nearly uniform: the quarters of the range have equal counts.
  quarters = np.bincount(scores >> 29, minlength=4)
  assert np.abs(quarters - 2**14).max() < 5 * np.sqrt(2**14)
  other = np.asarray(distances.random_scores(positions, key + 1))
  assert abs(np.corrcoef(scores, other)[0, 1]) < 0.02
  # A score depends only on its position and salt.
  some = jnp.uint32([[5, 77], [2**16 - 1, 0]])
  np.testing.assert_array_equal(
    distances.random_scores(some, key), scores[np.asarray(some)]
  )
