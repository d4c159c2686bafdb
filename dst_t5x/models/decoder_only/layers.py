"""Building blocks of decoder-only networks."""

from collections.abc import Callable
from typing import Any

from flax import linen as nn
from flax.linen import partitioning
import jax
from jax import lax
import jax.numpy as jnp

from dst_t5x.models import layers
from dst_t5x.models.layers import constrain

Array = jax.Array

# Of all weights, as these families are initialised.
_NORMAL = nn.initializers.normal(stddev=0.02)
_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
  'gelu': lambda x: nn.gelu(x, approximate=True),
  'silu': nn.silu,
}


def cap(x: Array, limit: float | None) -> Array:
  """Returns limit · tanh(x / limit), or x without a limit."""
  return x if limit is None else jnp.tanh(x / limit) * limit


class Dense(layers.Dense):
  """A linear map; see `models.layers.Dense`."""

  kernel_init: layers.Initializer = _NORMAL


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


class Embed(layers.Embed):
  """Token embeddings; see `models.layers.Embed`."""

  embedding_init: layers.Initializer = _NORMAL


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
