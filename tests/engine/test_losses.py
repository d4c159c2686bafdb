"""The loss, compared with NumPy."""

import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dst_t5x.core.errors import UserError
from dst_t5x.engine import losses
from dst_t5x.models import api

VOCABULARY = 7


def _batch(packed=False):
  """Returns three rows of targets with padding; packed, two examples a row."""
  segments = np.array(
    [[1, 1, 1, 0, 0], [1, 1, 2, 2, 2], [0, 0, 0, 0, 0]], np.int32
  )
  return api.Targets(
    np.array([[3, 5, 1, 0, 0], [2, 1, 4, 6, 1], [0, 0, 0, 0, 0]], np.int32),
    np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]], np.int32),
    segments if packed else None,
  )


def _logits():
  return np.random.default_rng(0).normal(0, 3, (3, 5, VOCABULARY))


def _log_z(logits):
  return np.log(np.exp(logits).sum(-1))


def _cross_entropy(logits, targets, smoothing=0.0):
  """Returns the KL divergence from the smoothed targets, per token."""
  low = smoothing / (VOCABULARY - 1)
  wanted = np.where(
    np.arange(VOCABULARY) == targets[..., None], 1 - smoothing, low
  )
  log_wanted = np.log(np.where(wanted > 0, wanted, 1))
  log_p = logits - _log_z(logits)[..., None]
  return (wanted * (log_wanted - log_p)).sum(-1)


@pytest.mark.parametrize('smoothing', [0.0, 0.1])
@pytest.mark.parametrize('z_loss', [0.0, 0.01])
def test_sums(smoothing, z_loss):
  batch, logits = _batch(), _logits()
  loss = losses.Loss(label_smoothing=smoothing, z_loss=z_loss)
  sums = loss.sums(jnp.asarray(logits), batch)
  targets = batch.tokens
  real = batch.weights
  z = z_loss * _log_z(logits) ** 2
  smoothed = _cross_entropy(logits, targets, smoothing)
  expected = {
    'loss': ((smoothed + z) * real).sum(),
    'z_loss': (z * real).sum(),
    'cross_entropy': (_cross_entropy(logits, targets) * real).sum(),
    'correct': ((logits.argmax(-1) == targets) * real).sum(),
    'tokens': 8,
  }
  for name, value in expected.items():
    assert getattr(sums, name) == pytest.approx(value, rel=1e-5), name


def test_a_perfect_guess_costs_nothing_with_label_smoothing():
  smoothing = 0.1
  batch = _batch()
  wanted = np.where(
    np.arange(VOCABULARY) == batch.tokens[..., None],
    1 - smoothing,
    smoothing / (VOCABULARY - 1),
  )
  loss = losses.Loss(label_smoothing=smoothing, z_loss=0.0)
  assert loss.sums(jnp.log(wanted), batch).loss == pytest.approx(0, abs=1e-5)


def test_the_gradient_is_probabilities_minus_targets():
  batch, logits = _batch(), jnp.asarray(_logits())
  loss = losses.Loss(z_loss=0.0)
  gradient = jax.grad(lambda x: loss.sums(x, batch).loss)(logits)
  targets = jax.nn.one_hot(batch.tokens, VOCABULARY)
  expected = jax.nn.softmax(logits) - targets
  expected *= batch.weights[..., None]
  np.testing.assert_allclose(gradient, expected, atol=1e-6)


@pytest.mark.parametrize(
  ('factor', 'expected'),
  [
    (losses.REAL_TOKENS, 8),
    (losses.ALL_TOKENS, 15),
    (losses.PER_SEQUENCE, 2),
    (None, 1),
    (233472, 233472),
    (2.5, 2.5),
  ],
)
def test_normalizers(factor, expected):
  loss = losses.Loss(loss_normalizing_factor=factor)
  assert float(loss.normalizer(_batch())) == pytest.approx(expected)


def test_average_per_sequence_tells_packed_sequences_apart():
  batch, logits = _batch(packed=True), _logits()
  loss = losses.Loss(z_loss=0.0, loss_normalizing_factor=losses.PER_SEQUENCE)
  per_token = _cross_entropy(logits, batch.tokens)
  means = [per_token[0, :3].mean(), per_token[1, :2].mean()]
  means.append(per_token[1, 2:].mean())
  sums = loss.sums(jnp.asarray(logits), batch)
  normalizer = loss.normalizer(batch)
  assert float(normalizer) == pytest.approx(3)
  assert sums.loss / normalizer == pytest.approx(np.mean(means), rel=1e-5)
  # What is reported is per token all the same.
  assert sums.tokens == 8


@pytest.mark.parametrize('factor', typing.get_args(losses.Normalizer))
def test_a_batch_without_targets_is_no_division_by_zero(factor):
  batch = jax.tree.map(np.zeros_like, _batch())
  loss = losses.Loss(loss_normalizing_factor=factor)
  total = loss.sums(jnp.asarray(_logits()), batch).loss
  assert total / loss.normalizer(batch) == 0


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (
      {'loss_normalizing_factor': 'NUM_REAL_TOKENS'},
      "did you mean 'NUM_REAL_TARGET_TOKENS'",
    ),
    ({'loss_normalizing_factor': 0}, 'LOSS_NORMALIZING_FACTOR must be above 0'),
    ({'label_smoothing': 1.0}, r'LABEL_SMOOTHING must be in \[0, 1\)'),
  ],
)
def test_wrong_arguments(arguments, message):
  with pytest.raises(UserError, match=message):
    losses.Loss(**arguments)
