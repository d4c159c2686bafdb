"""Grouped-query attention with a sliding window, and which keys a query sees.

Ainslie et al. 2023, "GQA: Training Generalized Multi-Query Transformer Models".
"""

from typing import Any, NamedTuple

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from dst_t5x.models.decoder_only import layers
from dst_t5x.models.decoder_only import rope
from dst_t5x.models.decoder_only.config import DecoderConfig

Array = jax.Array

# Large enough that a masked weight is exactly zero after the softmax.
_MASKED = -1e10


class Context(NamedTuple):
  """What the layers know of the tokens that they are given.

  Attributes:
    rotations: of RoPE, float32 `[2, batch, query, head_dim / 2]`.
    mask: bool `[batch, query, key]`, which keys a query sees. Axis `batch` may
      be 1. The keys of a decoding step are the prompt's, then the cache's.
    step: place of the tokens in the cache, int32 scalar, or of each row int32
      `[batch]`; None outside of decoding.
  """

  rotations: Array
  mask: Array
  step: Array | None = None


def visible(
  query: Array, key: Array, is_there: Array | None, window: int | None
) -> Array:
  """Returns bool `[batch, query, key]`: which keys a causal query sees.

  Args:
    query: positions, int32 `[batch, query]`.
    key: positions, int32 `[batch, key]`.
    is_there: bool, broadcast to `[batch, query, key]`: keys that are tokens of
      the query's own example; None for all.
    window: keys that a query sees at most, itself included; None for all.
  """
  distance = query[:, :, None] - key[:, None, :]
  seen = distance >= 0
  if window is not None:
    seen &= distance < window
  return seen if is_there is None else seen & is_there


class SelfAttention(nn.Module):
  """Causal attention; heads of queries share heads of keys and values.

  A call with the collection `memory` mutable leaves the keys and values of a
  prompt there. A decoding step reads them, and adds its own to the collection
  `cache`; several rows, adjacent ones, may continue one prompt. Without a
  `memory`, the cache has the prompts, too.
  """

  config: DecoderConfig

  @nn.compact
  def __call__(self, inputs: Array, context: Context) -> Array:
    """Maps `[batch, length, embed]` to the same shape."""
    config = self.config
    query = self._heads(inputs, 'query', config.num_heads)
    key = self._heads(inputs, 'key', config.num_kv_heads)
    value = self._heads(inputs, 'value', config.num_kv_heads)
    if config.query_key_norms:
      query, key = self._norm(query, 'query_norm'), self._norm(key, 'key_norm')
    query = rope.rotate(query, context.rotations)
    key = rope.rotate(key, context.rotations)
    query = query * (config.query_scalar or config.head_dim) ** -0.5
    query = layers.constrain(query, 'batch', 'heads', 'length', 'kv')
    if context.step is None:
      self._memorise(key, value)
      x = self._attend(query, [(key, value)], context.mask)
    else:
      parts = [self._extend(key, value, context.step)]
      if self.has_variable('memory', 'key'):
        parts.insert(0, self._read('memory'))
      x = self._attend(query, parts, context.mask)
    return layers.Dense(
      inputs.shape[-1],
      axes=('joined_kv', 'embed'),
      dtype=config.dtype,
      name='out',
    )(x)

  def _heads(self, inputs: Array, name: str, heads: int) -> Array:
    """Maps `[batch, length, embed]` to `[batch, heads, length, head_dim]`."""
    config = self.config
    x = layers.Dense(
      heads * config.head_dim,
      # A single head is not divided among devices.
      axes=('embed', 'joined_kv' if heads > 1 else 'kv'),
      dtype=config.dtype,
      use_bias=config.qkv_biases,
      name=name,
    )(inputs)
    return x.reshape(*x.shape[:-1], heads, config.head_dim).swapaxes(-3, -2)

  def _norm(self, x: Array, name: str) -> Array:
    config = self.config
    return layers.RMSNorm(
      config.norm_epsilon, config.norm_adds_one, 'kv', config.dtype, name=name
    )(x)

  def _attend(
    self, query: Array, parts: list[tuple[Array, Array]], mask: Array
  ) -> Array:
    """Mixes values by attention.

    Args:
      query: `[rows, heads, query, head_dim]`.
      parts: keys and values, each `[batch, kv heads, key, head_dim]`, one part
        after the other; `rows` is a multiple of each part's `batch`.
      mask: bool `[rows, query, keys of all parts]`.

    Returns:
      `[rows, query, heads · head_dim]`.
    """
    logits = [_logits(query, key) for key, _ in parts]
    ends = np.cumsum([x.shape[-1] for x in logits])[:-1]
    joined = layers.cap(
      jnp.concatenate(logits, axis=-1), self.config.attention_logit_cap
    )
    joined = jnp.where(mask[:, None], joined, _MASKED)
    weights = jax.nn.softmax(joined).astype(self.config.dtype)
    x, *others = (
      _mixed(share, value)
      for share, (_, value) in zip(
        jnp.split(weights, ends, axis=-1), parts, strict=True
      )
    )
    x = sum(others, start=x).swapaxes(-3, -2)
    return x.reshape(*x.shape[:-2], -1)

  def _memorise(self, key: Array, value: Array) -> None:
    """Leaves a prompt's keys and values for the decoding steps."""
    if self.is_mutable_collection('memory'):
      self.put_variable('memory', 'key', key)
      self.put_variable('memory', 'value', value)

  def _read(self, collection: str) -> tuple[Array, Array]:
    """Returns the keys and values that a collection has."""
    return (
      self.get_variable(collection, 'key'),
      self.get_variable(collection, 'value'),
    )

  def _extend(
    self, key: Array, value: Array, step: Array
  ) -> tuple[Array, Array]:
    """Adds a step's keys and values to the cache.

    Returns:
      All keys and values of the cache's first rows, as many as are given.
    """
    for name, new in (('key', key), ('value', value)):
      cached: Any = self.get_variable('cache', name)
      self.put_variable('cache', name, _written(cached, new, step))
    keys, values = self._read('cache')
    return keys[: len(key)], values[: len(value)]


def _written(cached: Array, new: Array, step: Array) -> Array:
  """Returns a cache `[rows, heads, length, head_dim]` with a step's entries.

  Args:
    cached: the cache.
    new: `[new rows, heads, 1, head_dim]`, of the first rows.
    step: see `Context`.
  """
  if not step.ndim:
    return lax.dynamic_update_slice_in_dim(cached, new, step, -2)
  return cached.at[jnp.arange(len(step)), :, step].set(new[:, :, 0])


def _grouped(x: Array, part: Array) -> Array:
  """Returns x with its rows by prompt, and its heads by those of the keys.

  Args:
    x: `[rows, heads, query, …]`.
    part: keys or values, `[batch, kv heads, key, head_dim]`.

  Returns:
    `[batch, rows / batch, kv heads, heads / kv heads, query, …]`.
  """
  (rows, heads), (batch, kv_heads) = x.shape[:2], part.shape[:2]
  groups = batch, rows // batch, kv_heads, heads // kv_heads
  return x.reshape(*groups, *x.shape[2:])


def _logits(query: Array, key: Array) -> Array:
  """Returns float32 `[rows, heads, query, key]`."""
  logits = jnp.einsum(
    'bnkgqd,bksd->bnkgqs',
    _grouped(query, key),
    key,
    preferred_element_type=jnp.float32,
  )
  return logits.reshape(*query.shape[:-1], -1)


def _mixed(weights: Array, value: Array) -> Array:
  """Returns `[rows, heads, query, head_dim]`."""
  x = jnp.einsum('bnkgqs,bksd->bnkgqd', _grouped(weights, value), value)
  return x.reshape(*weights.shape[:-1], -1)
