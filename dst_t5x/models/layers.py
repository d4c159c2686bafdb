"""Layers that all families of networks share.

Every linear map goes through `Dense`, and every table of embeddings through
`Embed`, so that adapters find them; see `adapters.api`.
"""

from collections.abc import Callable
from typing import Any

from flax import linen as nn
from flax.linen import partitioning
import jax
import jax.numpy as jnp

Array = jax.Array
Initializer = Callable[..., Array]


def constrain(x: Array, *axes: str | None) -> Array:
  """Pins the sharding of an activation whose axes have these logical names."""
  return partitioning.with_sharding_constraint(x, axes)


class Dense(nn.Module):
  """A linear map of the last axis: `[…, n] -> […, features]`.

  A family subclasses it to give `kernel_init` a default.
  """

  features: int
  axes: tuple[str, str]
  dtype: Any = jnp.float32
  use_bias: bool = False
  kernel_init: Initializer = nn.initializers.lecun_normal()

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


class Embed(nn.Module):
  """Token embeddings, by gathering: `[batch, length] -> […, features]`.

  A family subclasses it to give `embedding_init` a default.
  """

  vocab_size: int
  features: int
  dtype: Any = jnp.float32
  embedding_init: Initializer = nn.initializers.normal(stddev=1.0)

  def setup(self) -> None:
    """Makes the table."""
    self.embedding = partitioning.param_with_axes(
      'embedding',
      self.embedding_init,
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
