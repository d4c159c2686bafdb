"""The encoder and the decoder of T5 1.1, and their layers."""

from collections.abc import Sequence
from typing import Any

from flax import linen as nn
from flax.linen import partitioning
import jax
import jax.numpy as jnp

from dst_t5x.models.dropout import Dropout
from dst_t5x.models.t5 import attention
from dst_t5x.models.t5 import layers
from dst_t5x.models.t5.config import T5Config
from dst_t5x.models.t5.layers import constrain

Array = jax.Array


class _Layer(nn.Module):
  """The base of encoder and decoder layers."""

  config: T5Config
  decode: bool = False

  def _norm(self, x: Array, name: str) -> Array:
    return layers.LayerNorm(self.config.dtype, name=name)(x)

  def _attention(self, kind: type[nn.Module], name: str) -> nn.Module:
    config = self.config
    return kind(
      num_heads=config.num_heads,
      head_dim=config.head_dim,
      decode=self.decode,
      dtype=config.dtype,
      float32_logits=config.float32_attention_logits,
      name=name,
    )

  def _mlp(self, x: Array, dropout: Dropout) -> Array:
    config = self.config
    return layers.MlpBlock(
      mlp_dim=config.mlp_dim,
      activations=config.mlp_activations,
      dtype=config.dtype,
      name='mlp',
    )(x, dropout)

  def _add(self, residual: Array, x: Array, dropout: Dropout) -> Array:
    return constrain(dropout(x) + residual, 'batch', 'length', 'embed')


class EncoderLayer(_Layer):
  """Self-attention and feed-forward, each with pre-norm and residual."""

  @nn.compact
  def __call__(
    self, inputs: Array, bits: Array | None, mask: Array, bias: Array
  ) -> tuple[Array, None]:
    """Maps `[batch, length, embed]` to the same shape.

    The second result, None, is for `nn.scan`.
    """
    dropout = Dropout(self.config.dropout_rate, bits)
    x = self._norm(inputs, 'pre_attention_layer_norm')
    x = self._attention(attention.SelfAttention, 'attention')(
      x, mask, bias, dropout
    )
    x = self._add(inputs, x, dropout)
    y = self._mlp(self._norm(x, 'pre_mlp_layer_norm'), dropout)
    y = self._add(x, y, dropout)
    dropout.end()
    return y, None


class DecoderLayer(_Layer):
  """Self-attention, cross-attention and feed-forward."""

  @nn.compact
  def __call__(
    self,
    inputs: Array,
    bits: Array | None,
    mask: Array | None,
    bias: Array,
    position: Array | None,
    encoded: Array,
    encoder_mask: Array,
  ) -> tuple[Array, None]:
    """Maps `[batch, length, embed]` to the same shape.

    The second result, None, is for `nn.scan`.
    """
    dropout = Dropout(self.config.dropout_rate, bits)
    x = self._norm(inputs, 'pre_self_attention_layer_norm')
    x = self._attention(attention.SelfAttention, 'self_attention')(
      x, mask, bias, dropout, position
    )
    x = self._add(inputs, x, dropout)
    y = self._norm(x, 'pre_cross_attention_layer_norm')
    y = self._attention(attention.CrossAttention, 'encoder_decoder_attention')(
      y, encoded, encoder_mask, dropout
    )
    y = self._add(x, y, dropout)
    z = self._mlp(self._norm(y, 'pre_mlp_layer_norm'), dropout)
    z = self._add(y, z, dropout)
    dropout.end()
    return z, None


class _Stack(nn.Module):
  """The base of encoder and decoder."""

  config: T5Config
  embedder: layers.Embed

  def _apply_layers(
    self,
    layer: type[_Layer],
    num_layers: int,
    fields: dict[str, Any],
    x: Array,
    bits: Array | None,
    *context: Array | None,
  ) -> Array:
    """Applies layers to x and returns `[batch, length, embed]`.

    Args:
      layer: the layers' class.
      num_layers: the number of layers.
      fields: fields of the layers.
      x: `[batch, length, embed]`.
      bits: uint32 `[layers, batch, width]`, for dropout.
      *context: further arguments, the same for all layers.
    """
    config = self.config
    if config.remat:
      layer = partitioning.remat(layer, prevent_cse=not config.scan_layers)
    if config.scan_layers:
      stack = partitioning.scan_with_axes(
        layer,
        variable_axes={'params': 0, 'cache': 0, 'memory': 0},
        split_rngs={'params': True, 'dropout': True},
        in_axes=(0, *(nn.broadcast for _ in context)),
        length=num_layers,
        axis_name='layers',
      )
      x, _ = stack(name='layers', config=config, **fields)(x, bits, *context)
      return x
    for i in range(num_layers):
      of_layer = None if bits is None else bits[i]
      x, _ = layer(name=f'layers_{i}', config=config, **fields)(
        x, of_layer, *context
      )
    return x

  def _bits(
    self,
    num_layers: int,
    x: Array,
    key_lengths: Sequence[int],
    deterministic: bool,
  ) -> Array | None:
    """Draws the bits of the layers' dropout; see `dropout.Dropout`.

    Args:
      num_layers: the number of layers.
      x: `[batch, length, embed]`.
      key_lengths: for each attention of a layer, its number of keys.
      deterministic: whether dropout is off.

    Returns:
      uint32 `[layers, batch, width]`, enough for the weights and the output of
      each attention, and for the hidden units and the output of the
      feed-forward block. None if there is no dropout.
    """
    config = self.config
    if deterministic or not config.dropout_rate:
      return None
    width = sum(config.num_heads * n + config.emb_dim for n in key_lengths)
    width += config.mlp_dim + config.emb_dim
    key = self.make_rng('dropout')
    bits = jax.random.bits(key, (num_layers, x.shape[0], width))
    return constrain(bits, 'layers', 'batch', None)

  def _dropout(self, x: Array, deterministic: bool) -> Array:
    """Applies dropout with one mask for all positions of an example."""
    return nn.Dropout(self.config.dropout_rate, broadcast_dims=(-2,))(
      x, deterministic=deterministic
    )


class Encoder(_Stack):
  """The encoder's stack of layers."""

  @nn.compact
  def __call__(self, tokens: Array, mask: Array, deterministic: bool) -> Array:
    """Maps tokens `[batch, length]` to `[batch, length, embed]`.

    Args:
      tokens: int32 `[batch, length]`.
      mask: bool `[batch, 1, query, key]`, which keys a query sees.
      deterministic: whether dropout is off.
    """
    config = self.config
    buckets = attention.relative_position_buckets(
      tokens.shape[-1], bidirectional=True
    )
    bias = attention.RelativePositionBias(config.num_heads, name='relpos_bias')(
      buckets
    )
    x = self.embedder(tokens)
    x = self._dropout(x, deterministic)
    num_layers = config.num_encoder_layers
    bits = self._bits(num_layers, x, [x.shape[1]], deterministic)
    x = self._apply_layers(EncoderLayer, num_layers, {}, x, bits, mask, bias)
    x = layers.LayerNorm(config.dtype, name='encoder_norm')(x)
    return nn.Dropout(config.dropout_rate)(x, deterministic=deterministic)


class Decoder(_Stack):
  """The decoder's stack of layers and the output projection."""

  @nn.compact
  def __call__(
    self,
    encoded: Array,
    encoder_mask: Array,
    tokens: Array,
    mask: Array | None,
    deterministic: bool,
    decode: bool,
    max_decode_length: int | None,
  ) -> Array:
    """Returns float32 logits `[batch, length, vocab]`.

    Args:
      encoded: `[batch, encoder length, embed]`.
      encoder_mask: bool, broadcast to `[batch, 1, length, encoder length]`.
      tokens: int32 `[batch, length]`, the decoder's inputs.
      mask: bool `[batch, 1, length, length]`; None while decoding.
      deterministic: whether dropout is off.
      decode: whether to create or use the cache.
      max_decode_length: length of the cache; None in the call that creates it.
    """
    config = self.config
    position = self._advance() if decode else None
    buckets, mask = attention.self_attention_positions(
      tokens.shape[-1], mask, position, max_decode_length
    )
    bias = attention.RelativePositionBias(config.num_heads, name='relpos_bias')(
      buckets
    )
    y = self._dropout(self.embedder(tokens), deterministic)
    num_layers = config.num_decoder_layers
    key_lengths = y.shape[1], encoded.shape[1]
    y = self._apply_layers(
      DecoderLayer,
      num_layers,
      {'decode': decode},
      y,
      self._bits(num_layers, y, key_lengths, deterministic),
      *(mask, bias, position, encoded, encoder_mask),
    )
    y = layers.LayerNorm(config.dtype, name='decoder_norm')(y)
    y = self._dropout(y, deterministic)
    if config.logits_via_embedding:
      return self.embedder.attend(y) / jnp.sqrt(config.emb_dim)
    return layers.Dense(
      config.vocab_size,
      axes=('embed', 'vocab'),
      name='logits_dense',
    )(y)

  def _advance(self) -> Array | None:
    """Advances the cache's position and returns the old one, int32 [].

    Returns None in the call that creates the cache.
    """
    exists = self.has_variable('cache', 'cache_index')
    index = self.variable('cache', 'cache_index', jnp.zeros, (), jnp.int32)
    if not exists:
      return None
    position = index.value
    index.value = position + 1
    return position
