"""Dropout whose bits are drawn in advance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dst_t5x.models.dropout import Dropout

_ROWS, _WIDTH = 64, 3 * 40 + 50


def _dropout(rate, seed=0):
  return Dropout(rate, jax.random.bits(jax.random.key(seed), (_ROWS, _WIDTH)))


@pytest.mark.parametrize('rate', [0.1, 0.5, 0.9])
def test_the_rate_and_the_scale(rate):
  dropout = _dropout(rate)
  weights = np.asarray(dropout(jnp.full((_ROWS, 3, 7, 40), 2.0)))
  features = np.asarray(dropout(jnp.full((_ROWS, 5, 50), 2.0)))
  dropout.end()
  for x in (weights, features):
    kept = x != 0
    np.testing.assert_allclose(x[kept], 2 / (1 - rate), rtol=1e-6)
    # Along length, all or none.
    np.testing.assert_array_equal(
      kept, np.broadcast_to(kept[..., :1, :], x.shape)
    )
    drawn = kept[..., 0, :]
    sigma = np.sqrt(rate * (1 - rate) / drawn.size)
    assert abs(drawn.mean() - (1 - rate)) < 5 * sigma


def test_places_and_examples_differ():
  dropout = _dropout(0.5)
  first, second = (np.asarray(dropout(jnp.ones((_ROWS, 1, 40)))) for _ in '12')
  agree = np.mean((first != 0) == (second != 0))
  assert abs(agree - 0.5) < 0.05
  assert len(np.unique(first, axis=0)) == _ROWS


def test_without_bits_nothing_is_dropped():
  x = jnp.arange(6.0).reshape(1, 2, 3)
  dropout = Dropout(0.5, None)
  np.testing.assert_array_equal(dropout(x), x)
  dropout.end()


def test_bits_that_nobody_used():
  dropout = _dropout(0.5)
  dropout(jnp.ones((_ROWS, 1, 40)))
  with pytest.raises(AssertionError):
    dropout.end()
