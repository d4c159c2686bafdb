"""Layers that all families of networks share.

Every linear map is a `Dense`, and every table of embeddings an `Embed`. This is
how adapters find them; see `adapters.api`.
"""

from collections.abc import Callable
from typing import Any

from flax import linen as nn
from flax.linen import partitioning
import jax
import jax.numpy as jnp

from dst_t5x.models import sharding
from dst_t5x.models.sharding import constrain as constrain

Array = jax.Array
Initializer = Callable[..., Array]


class Dense(nn.Module):
  """A linear map of the last axis: `[…, n] -> […, features]`.

  Families subclass it to change the default of `kernel_init`.
  """

  features: int
  axes: tuple[str, str]
  dtype: Any = jnp.float32
  use_bias: bool = False
  kernel_init: Initializer = nn.initializers.lecun_normal()

  @nn.compact
  def __call__(self, inputs: Array) -> Array:
    """Returns `[…, features]`, computed in `dtype`."""
    kernel = partitioning.param_with_axes(
      'kernel',
      self.kernel_init,
      (inputs.shape[-1], self.features),
      jnp.float32,
      axes=self.axes,
    )
    kernel = sharding.gather(kernel.astype(self.dtype), *self.axes)
    y = jnp.dot(inputs.astype(self.dtype), kernel)
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
  """Token embeddings: `[batch, length] -> [batch, length, features]`.

  Families subclass it to change the default of `embedding_init`.

  Attributes:
    vocab_size: the number of rows of the table.
    features: the number of columns.
    dtype: the type of the embeddings.
    embedding_init: the initializer of the table.
    scale: a factor of the embeddings that are looked up.
  """

  vocab_size: int
  features: int
  dtype: Any = jnp.float32
  embedding_init: Initializer = nn.initializers.normal(stddev=1.0)
  scale: float = 1.0

  def setup(self) -> None:
    """Creates the table of embeddings."""
    self.embedding = partitioning.param_with_axes(
      'embedding',
      self.embedding_init,
      (self.vocab_size, self.features),
      jnp.float32,
      axes=('vocab', 'embed'),
    )

  def __call__(self, tokens: Array) -> Array:
    """Returns `[batch, length, features]`; NaN for ids outside the table."""
    shared = sharding.exchanges(self.features, tokens.shape[0])
    x = self._exchanged(tokens, shared) if shared else self._gathered(tokens)
    x = constrain(x, 'batch', 'length', 'embed')
    return x if self.scale == 1 else x * jnp.asarray(self.scale, x.dtype)

  def _gathered(self, tokens: Array) -> Array:
    # JAX clamps ids by default, which would hide a vocabulary of another size.
    x = jnp.take(self.embedding, tokens, axis=0, mode='fill')
    return x.astype(self.dtype)

  def _exchanged(self, tokens: Array, shared: tuple[str, ...]) -> Array:
    """Looks up the tokens of all devices that share the table's columns.

    Each device looks up its columns, and then exchanges them for the other
    columns of its rows. A plain gather from such a table makes XLA replicate
    the embeddings of the whole batch.
    """
    x = self._gathered(sharding.with_rows_of_all(tokens, shared))
    return sharding.with_columns(x, shared)

  def attend(self, x: Array) -> Array:
    """Returns x times the transposed embeddings, float32 `[…, vocab_size]`."""
    embedding = sharding.gather(self.embedding, 'vocab', 'embed')
    return jnp.dot(x.astype(jnp.float32), embedding.T)
