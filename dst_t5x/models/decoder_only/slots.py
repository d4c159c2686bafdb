"""A cache whose rows are at different places; see `api.Slots`.

A row's tokens are at the beginning of its slot, without padding: a token's
place in the cache is its position. What a slot has behind the row's last token
is of earlier rows or of padding. No query sees it before it is overwritten.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dst_t5x.models.decoder_only import features
from dst_t5x.models.decoder_only.config import DecoderConfig

Array = jax.Array
PyTree = Any


class Slots(NamedTuple):
  """See `api.Slots`.

  Attributes:
    config: the network's.
    apply: the network's.
    params: the parameters.
    length: tokens of a row at most.
  """

  config: DecoderConfig
  apply: Callable[..., Any]
  params: PyTree
  length: int

  def blank(self, count: int) -> PyTree:
    """See `api.Slots`.

    Raises:
      UserError: rows are longer than the context.
    """
    features.check_length(self.config, self.length, 'to decode')
    prompts = jax.ShapeDtypeStruct((count, self.length), jnp.int32)
    shapes = jax.eval_shape(self._read, prompts)
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

  def fill(self, cache: PyTree, slots: Array, prompts: Array) -> PyTree:
    """See `api.Slots`."""
    length = prompts.shape[1]

    def filled(cached: Array, new: Array) -> Array:
      return cached.at[slots, :, :length].set(new, mode='drop')

    return jax.tree.map(filled, cache, self._read(prompts))

  def _read(self, prompts: Array) -> PyTree:
    """Returns the keys and values of prompts, `[batch, heads, length, …]`."""
    positions = jnp.broadcast_to(jnp.arange(prompts.shape[1]), prompts.shape)
    _, left = self.apply(
      {'params': self.params},
      jnp.maximum(prompts, 0),
      positions,
      positions,
      jnp.ones_like(prompts, bool),
      mutable=['memory'],
      method='decode',
    )
    return left['memory']

  def step(
    self, cache: PyTree, tokens: Array, positions: Array
  ) -> tuple[Array, PyTree]:
    """See `api.Slots`."""
    places = jnp.arange(self.length)[None]
    logits, updated = self.apply(
      {'params': self.params, 'cache': cache},
      tokens[:, None],
      positions[:, None],
      places,
      jnp.ones_like(places, bool),
      positions,
      mutable=['cache'],
      method='decode',
    )
    return logits[:, 0], updated['cache']
