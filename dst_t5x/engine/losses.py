"""The loss of a language model, normalized as in T5X."""

import dataclasses
from typing import Any, Final, Literal, NamedTuple

import jax
import jax.numpy as jnp

from dst_t5x.core import values
from dst_t5x.models import api

REAL_TOKENS: Final = 'NUM_REAL_TARGET_TOKENS'
ALL_TOKENS = 'NUM_TOTAL_TARGET_TOKENS'
PER_SEQUENCE = 'AVERAGE_PER_SEQUENCE'
Normalizer = Literal[
  'NUM_REAL_TARGET_TOKENS', 'NUM_TOTAL_TARGET_TOKENS', 'AVERAGE_PER_SEQUENCE'
]


class Sums(NamedTuple):
  """Sums over the real target tokens of a batch; all float32 []."""

  loss: jax.Array  # The objective, with label smoothing and z-loss.
  z_loss: jax.Array
  cross_entropy: jax.Array
  correct: jax.Array
  tokens: jax.Array

  def averages(self) -> dict[str, jax.Array]:
    """Returns loss, z-loss and accuracy per real target token."""
    tokens = jnp.maximum(self.tokens, 1.0)
    return {
      'loss': self.cross_entropy / tokens,
      'z_loss': self.z_loss / tokens,
      'accuracy': self.correct / tokens,
    }


@dataclasses.dataclass(frozen=True)
class Loss:
  """Cross entropy over target tokens.

  Attributes:
    label_smoothing: probability that is spread over the other tokens.
    z_loss: weight of log² Z, which keeps logits from drifting.
    loss_normalizing_factor: the divisor of the summed loss: a number (T5X's
      233472 for public T5 checkpoints), `NUM_REAL_TARGET_TOKENS`,
      `NUM_TOTAL_TARGET_TOKENS` (padding included), `AVERAGE_PER_SEQUENCE` (all
      sequences have the same weight), or None for the sum.
  """

  label_smoothing: values.BelowOne = 0.0
  z_loss: values.NotNegative = 0.0001
  loss_normalizing_factor: values.AboveZero | Normalizer | None = REAL_TOKENS

  def __post_init__(self) -> None:
    values.check_fields(self)

  def weights(self, targets: api.Targets) -> jax.Array:
    """Returns the weight of each token's loss, float32 [batch, length]."""
    weights = targets.weights.astype(jnp.float32)
    if self.loss_normalizing_factor != PER_SEQUENCE:
      return weights
    return weights / jnp.maximum(_lengths(targets, weights), 1.0)

  def normalizer(self, targets: api.Targets) -> jax.Array | float:
    """Returns the divisor of the sum over this whole batch, float32 []."""
    weights = targets.weights.astype(jnp.float32)
    factor = self.loss_normalizing_factor
    if factor is None:
      return 1.0
    if factor == REAL_TOKENS:
      return jnp.maximum(jnp.sum(weights), 1.0)
    if factor == ALL_TOKENS:
      return float(weights.size)
    if factor == PER_SEQUENCE:
      return jnp.maximum(jnp.sum(self.weights(targets)), 1.0)
    return float(factor)

  def sums(self, logits: jax.Array, targets: api.Targets) -> Sums:
    """Returns the sums over a batch.

    Args:
      logits: [batch, length, vocab].
      targets: the tokens to predict.
    """
    logits = logits.astype(jnp.float32)
    tokens = targets.tokens
    log_z = jax.nn.logsumexp(logits, axis=-1)
    vocabulary = jax.lax.broadcasted_iota(tokens.dtype, logits.shape, 2)
    # Not a gather, whose gradient is a scatter over [batch, length, vocab].
    target_logits = jnp.sum(
      jnp.where(vocabulary == tokens[..., None], logits, 0.0), axis=-1
    )
    cross_entropy = log_z - target_logits
    z_loss = self.z_loss * jnp.square(log_z)
    smoothed = cross_entropy
    if self.label_smoothing:
      smoothed = self._smooth(logits, log_z, cross_entropy)
    real = targets.weights.astype(jnp.float32)
    correct = jnp.argmax(logits, axis=-1) == tokens
    return Sums(
      loss=jnp.sum((smoothed + z_loss) * self.weights(targets)),
      z_loss=jnp.sum(z_loss * real),
      cross_entropy=jnp.sum(cross_entropy * real),
      correct=jnp.sum(correct * real),
      tokens=jnp.sum(real),
    )

  def _smooth(
    self, logits: jax.Array, log_z: jax.Array, cross_entropy: jax.Array
  ) -> jax.Array:
    """Returns the smoothed loss [batch, length]; 0 for a perfect prediction."""
    others = logits.shape[-1] - 1
    low = self.label_smoothing / others
    high = 1.0 - self.label_smoothing
    all_tokens = logits.shape[-1] * log_z - jnp.sum(logits, axis=-1)
    entropy = high * jnp.log(high) + others * low * jnp.log(low + 1e-20)
    return low * all_tokens + (high - low) * cross_entropy + entropy


def forward(
  network: api.Network,
  loss: Loss,
  params: Any,
  batch: api.Batch,
  dropout_key: jax.Array | None = None,
) -> Sums:
  """Returns the teacher-forced sums over a batch.

  Args:
    network: the model.
    loss: the loss.
    params: the parameters.
    batch: the network's features, each [batch, length].
    dropout_key: a PRNG key; None for no dropout.
  """
  logits = network.logits(params, batch, dropout_key)
  return loss.sums(logits, network.targets(batch))


def _lengths(targets: api.Targets, weights: jax.Array) -> jax.Array:
  """Returns the number of tokens in each token's sequence, [batch, length]."""
  if targets.segments is None:
    return jnp.sum(weights, axis=1, keepdims=True)
  segments = targets.segments
  same = segments[:, :, None] == segments[:, None, :]
  return jnp.sum(same * weights[:, None, :], axis=-1)
