"""Attention, masks and relative positions of T5.

Parameters have the names and shapes of T5X's `t5x.examples.t5.layers`.
"""

from typing import Any

from flax import linen as nn
from flax.linen import partitioning
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from dst_t5x.models.dropout import Dropout
from dst_t5x.models.t5 import layers

Array = jax.Array

# So low that a masked weight is exactly zero after the softmax.
_MASKED = -1e10

_NORMAL = nn.initializers.variance_scaling(1.0, 'fan_in', 'normal')
_UNIFORM = nn.initializers.variance_scaling(1.0, 'fan_avg', 'uniform')


def pair_mask(query: Array, key: Array) -> Array:
  """Returns which pairs are both True, bool `[batch, 1, query, key]`."""
  return (query[:, :, None] & key[:, None, :])[:, None]


def same_segment(query: Array, key: Array) -> Array:
  """Returns which pairs share an example, bool `[batch, 1, query, key]`."""
  return (query[:, :, None] == key[:, None, :])[:, None]


def relative_position_buckets(
  length: int,
  *,
  bidirectional: bool,
  num_buckets: int = 32,
  max_distance: int = 128,
) -> np.ndarray:
  """Returns the bucket of every pair of positions, int32 `[query, key]`.

  Each short distance has its own bucket. Longer distances share buckets whose
  widths grow logarithmically up to `max_distance` (Raffel et al. 2020, section
  2.1).
  """
  positions = np.arange(length, dtype=np.int32)
  distance = positions[:, None] - positions[None, :]
  offset = np.zeros_like(distance)
  if bidirectional:
    num_buckets //= 2
    offset = np.where(distance < 0, num_buckets, 0).astype(np.int32)
    distance = np.abs(distance)
  distance = np.maximum(distance, 0)
  exact = num_buckets // 2
  # float32, as in every T5: float64 gives some powers of two another bucket.
  ratio = (np.maximum(distance, 1) / exact).astype(np.float32)
  far = np.log(ratio) / np.log(max_distance / exact) * (num_buckets - exact)
  far = np.minimum(exact + far.astype(np.int32), num_buckets - 1)
  return offset + np.where(distance < exact, distance, far).astype(np.int32)


def self_attention_positions(
  length: int,
  mask: Array | None,
  position: Array | None,
  max_decode_length: int | None,
) -> tuple[Any, Array | None]:
  """Returns position buckets `[query, key]` and the mask of self-attention.

  Args:
    length: of the decoder's inputs.
    mask: the mask of a whole sequence; ignored in a decoding step.
    position: int32 scalar, the position of a decoding step; None for a whole
      sequence.
    max_decode_length: length of the cache; needed for a decoding step.

  Raises:
    ValueError: a decoding step has no `max_decode_length`.
  """
  if position is None:
    return relative_position_buckets(length, bidirectional=False), mask
  if max_decode_length is None:
    raise ValueError('A decoding step needs max_decode_length.')
  buckets = relative_position_buckets(max_decode_length, bidirectional=False)
  # The one query sees the keys that the cache has so far.
  seen = jnp.arange(max_decode_length) <= position
  return jnp.asarray(buckets)[position][None], seen[None, None, None]


class RelativePositionBias(nn.Module):
  """A learned bias of the attention logits for each head and bucket."""

  num_heads: int
  num_buckets: int = 32

  @nn.compact
  def __call__(self, buckets: Array | np.ndarray) -> Array:
    """Maps buckets `[query, key]` to float32 `[1, heads, query, key]`."""
    rel_embedding = partitioning.param_with_axes(
      'rel_embedding',
      _UNIFORM,
      (self.num_heads, self.num_buckets),
      jnp.float32,
      axes=('heads', 'relpos_buckets'),
    )
    # Not a gather, because its gradient would be a slow scatter.
    one_hot = jax.nn.one_hot(buckets, self.num_buckets, axis=0)
    return jnp.einsum('hb,bqk->hqk', rel_embedding, one_hot)[None]


class _Attention(nn.Module):
  """The base of self-attention and cross-attention.

  Logits are not divided by sqrt(head_dim). Instead, the query's initial values
  are.
  """

  num_heads: int
  head_dim: int
  decode: bool = False
  dtype: Any = jnp.float32
  float32_logits: bool = False

  def _project(self, x: Array, name: str) -> Array:
    """Maps `[batch, length, embed]` to `[batch, heads, length, head_dim]`."""

    def query_init(*args: Any) -> Array:
      return _NORMAL(*args) / np.sqrt(self.head_dim).astype(np.float32)

    x = layers.Dense(
      self.num_heads * self.head_dim,
      axes=('embed', 'joined_kv'),
      dtype=self.dtype,
      kernel_init=query_init if name == 'query' else _NORMAL,
      name=name,
    )(x)
    x = x.reshape(*x.shape[:-1], self.num_heads, self.head_dim)
    return layers.constrain(
      x.swapaxes(-3, -2), 'batch', 'heads', 'length', 'kv'
    )

  def _attend(
    self,
    query: Array,
    key: Array,
    value: Array,
    mask: Array | None,
    bias: Array | None,
    dropout: Dropout,
    features: int,
  ) -> Array:
    """Returns the projected attention outputs.

    Args:
      query: `[batch, heads, query, head_dim]`.
      key: `[batch, heads, key, head_dim]`.
      value: `[batch, heads, key, head_dim]`.
      mask: bool, broadcast to `[batch, heads, query, key]`; False hides a key.
      bias: float32, broadcast to the same shape; added to the logits.
      dropout: applied to the attention weights.
      features: size of the output's last axis.

    Returns:
      `[batch, query, features]`.
    """
    logits = jnp.einsum(
      'bhqd,bhkd->bhqk',
      query,
      key,
      preferred_element_type=jnp.float32 if self.float32_logits else None,
    ).astype(jnp.float32)
    if bias is not None:
      logits = logits + bias
    if mask is not None:
      logits = jnp.where(mask, logits, _MASKED)
    weights = jax.nn.softmax(logits).astype(self.dtype)
    x = jnp.einsum('bhqk,bhkd->bhqd', dropout(weights), value).swapaxes(-3, -2)
    return layers.Dense(
      features,
      axes=('joined_kv', 'embed'),
      dtype=self.dtype,
      kernel_init=_NORMAL,
      name='out',
    )(x.reshape(*x.shape[:-2], -1))


class SelfAttention(_Attention):
  """Attention within a sequence, with a cache of keys and values.

  With `decode`, a call without `position` creates the cache: zeros, as long as
  the inputs. A call with `position` writes one token's keys and values there.
  """

  @nn.compact
  def __call__(
    self,
    inputs: Array,
    mask: Array | None,
    bias: Array | None,
    dropout: Dropout,
    position: Array | None = None,
  ) -> Array:
    """Maps `[batch, length, embed]` to the same shape.

    Args:
      inputs: `[batch, length, embed]`; length is 1 in a decoding step.
      mask: bool, broadcast to `[batch, heads, length, key]`.
      bias: float32, broadcast to the same shape.
      dropout: applied to the attention weights.
      position: int32 scalar, the token's position in a decoding step.
    """
    query = self._project(inputs, 'query')
    key = self._project(inputs, 'key')
    value = self._project(inputs, 'value')
    if self.decode:
      key = self._cache('cached_key', key, position)
      value = self._cache('cached_value', value, position)
    features = inputs.shape[-1]
    return self._attend(query, key, value, mask, bias, dropout, features)

  def _cache(self, name: str, new: Array, position: Array | None) -> Array:
    cached = self.variable('cache', name, jnp.zeros_like, new)
    if position is None:
      return new
    cached.value = lax.dynamic_update_slice_in_dim(
      cached.value, new, position, axis=-2
    )
    return cached.value


class CrossAttention(_Attention):
  """Attention to the encoder's output.

  During decoding, the keys and values of the encoder's output do not change. A
  call with `decode` and a mutable collection `memory` stores them there. Calls
  with `memory` read them, and calls without it compute them. `memory` is not
  part of `cache`, because T5X creates its cache from dummy inputs.
  """

  @nn.compact
  def __call__(
    self, inputs: Array, encoded: Array, mask: Array, dropout: Dropout
  ) -> Array:
    """Maps `[batch · beams, length, embed]` to the same shape.

    Args:
      inputs: `[batch · beams, length, embed]`, an example's beams adjacent.
      encoded: `[batch, key, embed]`.
      mask: bool, broadcast to `[batch, heads, length, key]`; with several
        beams, all queries must have the same mask.
      dropout: applied to the attention weights.
    """
    features = inputs.shape[-1]
    # The beams of an example become more queries on the same keys.
    query = self._project(
      inputs.reshape(encoded.shape[0], -1, features), 'query'
    )
    key = self._memorise('key', encoded)
    value = self._memorise('value', encoded)
    x = self._attend(query, key, value, mask, None, dropout, features)
    return x.reshape(inputs.shape)

  def _memorise(self, name: str, encoded: Array) -> Array:
    if self.has_variable('memory', name):
      return self.get_variable('memory', name)
    projected = self._project(encoded, name)
    if self.decode and self.is_mutable_collection('memory'):
      self.put_variable('memory', name, projected)
    return projected
