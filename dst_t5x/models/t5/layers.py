"""Building blocks of T5 1.1.

Parameter names, shapes, initialisers and logical axes are those of T5X's
`t5x.examples.t5.layers`, so that its checkpoints load by name.
"""

from collections.abc import Sequence
import functools
import operator
from typing import Any

from flax import linen as nn
from flax.linen import partitioning
import jax
from jax import lax
import jax.numpy as jnp

from dst_t5x.models import layers
from dst_t5x.models.dropout import Dropout
from dst_t5x.models.layers import Embed as Embed
from dst_t5x.models.layers import constrain

Array = jax.Array
DType = Any

_TRUNCATED = nn.initializers.variance_scaling(1.0, 'fan_in', 'truncated_normal')


class Dense(layers.Dense):
  """A linear map without bias; see `models.layers.Dense`."""

  kernel_init: layers.Initializer = _TRUNCATED


class LayerNorm(nn.Module):
  """Divides by the root mean square of the last axis, and scales.

  T5 subtracts no mean and adds no bias (Raffel et al. 2020, section 2.1).
  """

  dtype: DType = jnp.float32
  epsilon: float = 1e-6

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Returns `[…, n]` in `dtype`, normalised in float32."""
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


class MlpBlock(nn.Module):
  """Feed-forward block, gated if it has two activations (Shazeer 2020)."""

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
