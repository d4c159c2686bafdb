"""Building blocks of decoder-only networks.

Every linear map goes through `Dense`, and every table of embeddings through
`Embed`, so that adapters find them; see `adapters.api`.
"""

from collections.abc import Callable
from typing import Any

from flax import linen as nn
from flax.linen import partitioning
import jax
from jax import lax
import jax.numpy as jnp

Array = jax.Array
Initializer = Callable[..., Array]

# Of all weights, as these families are initialised.
_NORMAL = nn.initializers.normal(stddev=0.02)
_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
  'gelu': lambda x: nn.gelu(x, approximate=True),
  'silu': nn.silu,
}


def constrain(x: Array, *axes: str | None) -> Array:
  """Pins the sharding of an activation whose axes have these logical names."""
  return partitioning.with_sharding_constraint(x, axes)


def cap(x: Array, limit: float | None) -> Array:
  """Returns limit · tanh(x / limit), or x without a limit."""
  return x if limit is None else jnp.tanh(x / limit) * limit


class Dense(nn.Module):
  """A linear map of the last axis: `[…, n] -> […, features]`."""

  features: int
  axes: tuple[str, str]
  dtype: Any = jnp.float32
  use_bias: bool = False
  kernel_init: Initializer = _NORMAL

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
    y = jnp.dot(inputs.astype(self.dtype), kernel.astype(self.dtype))
    if not self.use_bias:
      return y
    bias = partitioning.param_with_axes(
      'bias',
      nn.initializers.zeros,
      (self.features,),
      jnp.float32,
      axes=self.axes[1:],
    )
    return y + bias.astype(self.dtype)


class RMSNorm(nn.Module):
  """Division by the root mean square of the last axis, then a learned scale.

  Zhang and Sennrich 2019, "Root Mean Square Layer Normalization".
  """

  epsilon: float
  adds_one: bool
  axis: str = 'embed'
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Normalises `[…, n]` in float32, returns it in `dtype`."""
    ones, zeros = nn.initializers.ones, nn.initializers.zeros
    scale = partitioning.param_with_axes(
      'scale',
      zeros if self.adds_one else ones,
      (x.shape[-1],),
      jnp.float32,
      axes=(self.axis,),
    )
    x = x.astype(jnp.float32)
    mean_square = jnp.mean(lax.square(x), axis=-1, keepdims=True)
    normed = x * lax.rsqrt(mean_square + self.epsilon)
    factor = 1.0 + scale if self.adds_one else scale
    return (normed * factor).astype(self.dtype)


class Embed(nn.Module):
  """Token embeddings, by gathering: `[batch, length] -> […, features]`."""

  vocab_size: int
  features: int
  dtype: Any = jnp.float32

  def setup(self) -> None:
    """Makes the table."""
    self.embedding = partitioning.param_with_axes(
      'embedding',
      _NORMAL,
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
  """A gated feed-forward block (Shazeer 2020, "GLU Variants")."""

  mlp_dim: int
  activation: str
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, inputs: Array) -> Array:
    """Maps `[batch, length, embed]` to the same shape."""

    def up(name: str) -> Array:
      return Dense(
        self.mlp_dim, axes=('embed', 'mlp'), dtype=self.dtype, name=name
      )(inputs)

    x = _ACTIVATIONS[self.activation](up('wi_0')) * up('wi_1')
    x = constrain(x, 'batch', 'length', 'mlp')
    return Dense(
      inputs.shape[-1], axes=('mlp', 'embed'), dtype=self.dtype, name='wo'
    )(x)
