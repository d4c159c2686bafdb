"""The search by counting: exact, always ends, fast from a good guess."""

import functools

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from dst_t5x.method import thresholds

SILOS = 8
SIZE = 600
INFINITY = 0x7F800000


def _count(keys, positions, query):
  """Returns the counts of a matrix of distances, as the projection does."""
  tie = query.tie[:, None]
  early = jnp.where(keys == tie, keys.shape[1] - positions, 0)
  keys = jnp.where(tie == 0, keys, early)
  reached = keys[:, None, :] >= query.candidates[:, :, None]
  return jnp.sum(reached, axis=2, dtype=jnp.uint64)


@functools.partial(jax.jit, static_argnames='poison')
def _find(keys, budgets, guess, spread, poison=False):
  positions = jnp.arange(keys.shape[1], dtype=jnp.uint32)[None]
  sizes = jnp.full(len(keys), keys.shape[1], jnp.uint32)

  def count(query):
    counts = _count(keys, positions, query)
    rubbish = jnp.uint64(12345)
    return jnp.where(query.active[:, None] | (not poison), counts, rubbish)

  cut, passes = thresholds.find(count, budgets, sizes, guess, spread)
  threshold, before = cut.threshold[:, None], cut.before[:, None]
  with jax.enable_x64(True):
    kept = (keys > threshold) | ((keys == threshold) & (positions < before))
  return kept, cut, passes


def check(keys, budgets, guess=None, spread=None, **kwargs):
  """Compares with the reference; returns the number of passes."""
  keys = np.asarray(keys, np.uint32)
  budgets = np.asarray(budgets, np.uint32)
  if guess is None:
    guess, spread = np.zeros(len(keys), np.uint32), np.zeros(len(keys))
  spread = np.asarray(spread, np.float32)
  kept, _, passes = _find(keys, budgets, guess, spread, **kwargs)
  expected = [
    reference.select(k, int(budget))
    for k, budget in zip(keys, budgets, strict=True)
  ]
  np.testing.assert_array_equal(kept, expected)
  return int(passes)


def bits(x):
  return np.asarray(x, np.float32).view(np.uint32)


def _distributions():
  """Returns distributions for which interpolation guesses badly, by name."""
  r = np.random.default_rng(0)
  zeros = np.zeros(SIZE, np.uint32)
  normal = bits(np.abs(r.standard_normal(SIZE)))
  return {
    'all equal': np.full(SIZE, bits(0.1)),
    'all zero': zeros,
    'one moved': np.where(np.arange(SIZE) == 333, bits(1e-30), zeros),
    'all infinite': np.full(SIZE, np.uint32(INFINITY)),
    'normal': normal,
    'half of them zero': np.where(r.random(SIZE) < 0.5, zeros, normal),
    'whole range': r.permutation(np.linspace(1, INFINITY, SIZE)).astype('u4'),
    'geometric': bits(2.0 ** r.permutation(np.linspace(-126, 127, SIZE))),
    'next to each other': np.arange(SIZE, dtype=np.uint32) + bits(1.0),
    'the smallest': np.arange(SIZE, dtype=np.uint32),
    'double exponential': bits(2.0 ** -(2.0 ** (7 * r.random(SIZE)))),
    'two clusters': bits(
      np.where(r.random(SIZE) < 0.5, 1e-30, 1e30)
      * (1 + 1e-6 * r.standard_normal(SIZE))
    ),
    'one far away': np.where(np.arange(SIZE) == 5, bits(3e38), normal % 64 + 1),
    'two values': np.where(r.random(SIZE) < 0.9, bits(1.0), bits(2.0)),
    'few values': r.choice(bits([1e-3, 2e-3, 4e-3]), SIZE),
    'nan and infinity': np.where(
      np.arange(SIZE) % 7 == 0,
      np.uint32(0x7FC00000) + np.arange(SIZE, dtype=np.uint32) % 2,
      np.where(np.arange(SIZE) % 7 == 1, np.uint32(INFINITY), normal),
    ),
  }


@pytest.mark.parametrize('name', _distributions())
def test_every_distribution_ends_soon(name):
  keys = np.tile(_distributions()[name], (SILOS, 1))
  for budgets in (
    [0, 1, 2, 3, 10, 100, 299, 300],
    [301, 400, 500, 597, 598, 599, 600, 600],
  ):
    assert check(keys, budgets) <= 24
    # As far from the answer as a guess can be.
    worst = np.array([1, 2, 2**31, INFINITY, 2**32 - 1] * 2, 'u4')[:SILOS]
    spread = [0, 1e38, np.inf, np.nan, -5, 1, 1e-38, 8]
    assert check(keys, budgets, worst, spread) <= 25


keys_strategy = st.one_of(
  st.integers(0, 3),
  st.sampled_from([0, 1, 2, int(bits(1.0)), INFINITY - 1, INFINITY]),
  st.integers(0, INFINITY),
  st.floats(0, width=32).map(lambda x: int(bits(x))),
)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_keys_any_budget_any_guess(data):
  seed = data.draw(st.integers(0, 2**32 - 1))
  # A few drawn values, then a random sequence of them: many ties, or few.
  values = data.draw(st.lists(keys_strategy, min_size=1, max_size=40))
  r = np.random.default_rng(seed)
  values = np.concatenate([values, r.integers(0, INFINITY, r.integers(200))])
  keys = r.choice(values.astype(np.uint32), (SILOS, SIZE))
  budgets = data.draw(
    st.lists(st.integers(0, SIZE), min_size=SILOS, max_size=SILOS)
  )
  guess = np.array(
    data.draw(
      st.lists(st.integers(0, 2**32 - 1), min_size=SILOS, max_size=SILOS)
    ),
    np.uint32,
  )
  spread = data.draw(
    st.lists(st.floats(width=32), min_size=SILOS, max_size=SILOS)
  )
  assert check(keys, budgets) <= 40
  assert check(keys, budgets, guess, spread, poison=True) <= 40


def test_a_guess_that_is_right_takes_one_pass():
  r = np.random.default_rng(1)
  keys = bits(np.abs(r.standard_normal((SILOS, SIZE))))
  budgets = np.array([1, 2, 5, 30, 100, 300, 500, 599], np.uint32)
  zeros = np.zeros(SILOS)
  _, cut, cold = _find(keys, budgets, zeros.astype(np.uint32), zeros)
  assert cold > 1
  assert check(keys, budgets, np.asarray(cut.threshold), zeros) == 1


def test_nothing_to_search_takes_no_pass():
  keys = np.ones((SILOS, SIZE), np.uint32)
  assert check(keys, [0, SIZE] * (SILOS // 2)) == 0
