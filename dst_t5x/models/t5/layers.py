"""Building blocks of T5 1.1.

Parameter names, shapes, initialisers and logical axes are those of T5X's
`t5x.examples.t5.layers`, so that its checkpoints load by name. Every linear map
goes through `Dense`: one place decides how a kernel acts.
"""

from collections.abc import Callable, Sequence
import functools
import operator
from typing import Any

from flax import linen as nn
from flax.linen import partitioning
import jax
from jax import lax
import jax.numpy as jnp

from dst_t5x.models.dropout import Dropout

Array = jax.Array
DType = Any
Initializer = Callable[..., Array]

_TRUNCATED = nn.initializers.variance_scaling(1.0, 'fan_in', 'truncated_normal')


def constrain(x: Array, *axes: str | None) -> Array:
  """Pins the sharding of an activation whose axes have these logical names."""
  return partitioning.with_sharding_constraint(x, axes)


class Dense(nn.Module):
  """A linear map of the last axis, without bias: `[…, n] -> […, features]`."""

  features: int
  axes: tuple[str, str]
  dtype: DType = jnp.float32
  kernel_init: Initializer = _TRUNCATED

  @nn.compact
  def __call__(self, inputs: Array) -> Array:
    """Applies the map in `dtype`."""
    kernel = partitioning.param_with_axes(
      'kernel',
      self.kernel_init,
      (inputs.shape[-1], self.features),
      jnp.float32,
      axes=self.axes,
    )
    return jnp.dot(inputs.astype(self.dtype), kernel.astype(self.dtype))


class LayerNorm(nn.Module):
  """Division by the root mean square of the last axis, then a learned scale.

  T5 subtracts no mean and adds no bias (Raffel et al. 2020, section 2.1).
  """

  dtype: DType = jnp.float32
  epsilon: float = 1e-6

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Normalises `[…, n]` in float32, returns it in `dtype`."""
    scale = partitioning.param_with_axes(
      'scale',
      nn.initializers.ones,
      (x.shape[-1],),
      jnp.float32,
      axes=('embed',),
    )
    x = x.astype(jnp.float32)
    mean_square = jnp.mean(lax.square(x), axis=-1, keepdims=True)
    normed = (x * lax.rsqrt(mean_square + self.epsilon)).astype(self.dtype)
    return normed * scale.astype(self.dtype)


class Embed(nn.Module):
  """Token embeddings, by gathering: `[batch, length] -> […, features]`."""

  vocab_size: int
  features: int
  dtype: DType = jnp.float32

  def setup(self) -> None:
    """Makes the table."""
    self.embedding = partitioning.param_with_axes(
      'embedding',
      nn.initializers.normal(stddev=1.0),
      (self.vocab_size, self.features),
      jnp.float32,
      axes=('vocab', 'embed'),
    )

  def __call__(self, tokens: Array) -> Array:
    """Returns the embeddings; an id outside the vocabulary gives NaN."""
    # Clamping, JAX's default, would hide a vocabulary of the wrong size.
    x = jnp.take(self.embedding, tokens, axis=0, mode='fill')
    return constrain(x.astype(self.dtype), 'batch', 'length', 'embed')

  def attend(self, x: Array) -> Array:
    """Returns float32 `[…, vocab_size]`: x times the transposed embeddings."""
    return jnp.dot(x.astype(jnp.float32), self.embedding.T)


class MlpBlock(nn.Module):
  """Feed-forward block, gated where it has two activations (Shazeer 2020)."""

  mlp_dim: int
  activations: Sequence[str]
  dtype: DType = jnp.float32

  @nn.compact
  def __call__(self, inputs: Array, dropout: Dropout) -> Array:
    """Maps `[batch, length, embed]` to the same shape."""
    gates = []
    for i, name in enumerate(self.activations):
      x = Dense(
        self.mlp_dim,
        axes=('embed', 'mlp'),
        dtype=self.dtype,
        name=f'wi_{i}' if len(self.activations) > 1 else 'wi',
      )(inputs)
      gates.append(x if name == 'linear' else getattr(nn, name)(x))
    x = functools.reduce(operator.mul, gates)
    x = constrain(dropout(x), 'batch', 'length', 'mlp')
    return Dense(
      inputs.shape[-1],
      axes=('mlp', 'embed'),
      dtype=self.dtype,
      name='wo',
    )(x)
