"""The T5 1.1 encoder-decoder.

Raffel et al. 2020, "Exploring the Limits of Transfer Learning with a Unified
Text-to-Text Transformer", as changed by version 1.1: gated GELU, untied output
projection. Parameter paths, shapes and call interface are those of T5X's
`t5x.examples.t5.network`, so that its checkpoints load by name and T5X itself
can train this network.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any, Literal

from flax import linen as nn
from flax.linen import partitioning
import jax
import jax.numpy as jnp

from dst_t5x.adapters import api as adapters
from dst_t5x.core import values
from dst_t5x.models.t5 import attention
from dst_t5x.models.t5 import layers
from dst_t5x.models.t5.dropout import Dropout
from dst_t5x.models.t5.layers import constrain

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class T5Config:
  """Sizes and options of the network; names as in T5X.

  Attributes:
    dtype: of the activations, float32 or bfloat16; parameters are float32.
    mlp_activations: one activation, or two for a gated block; names of
      flax.linen or 'linear'.
    logits_via_embedding: whether the output projection is the embedding table.
    float32_attention_logits: whether products of queries and keys are kept in
      float32 where activations are bfloat16; the softmax always is float32.
    scan_layers: whether the layers of a stack are one scan over parameters
      stacked on axis 0, which compiles the layer once.
    remat: whether the backward pass recomputes each layer from its input.
    adapter: what a tuning method adds; nothing by default.
  """

  vocab_size: values.Positive
  dtype: Literal['float32', 'bfloat16'] | jnp.dtype | type = jnp.float32
  emb_dim: values.Positive = 512
  num_heads: values.Positive = 8
  num_encoder_layers: values.Positive = 6
  num_decoder_layers: values.Positive = 6
  head_dim: values.Positive = 64
  mlp_dim: values.Positive = 2048
  mlp_activations: Sequence[str] = ('relu',)
  dropout_rate: values.BelowOne = 0.1
  logits_via_embedding: bool = False
  float32_attention_logits: bool = False
  scan_layers: bool = False
  remat: bool = False
  adapter: adapters.Adapter = adapters.NONE

  def __post_init__(self) -> None:
    values.check_fields(self)
    if isinstance(self.mlp_activations, list):  # From gin; `jit` hashes us.
      activations = tuple(self.mlp_activations)
      object.__setattr__(self, 'mlp_activations', activations)


class _Layer(nn.Module):
  """What the layers of both stacks share."""

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
      adapter=config.adapter,
      name=name,
    )

  def _mlp(self, x: Array, dropout: Dropout) -> Array:
    config = self.config
    return layers.MlpBlock(
      mlp_dim=config.mlp_dim,
      activations=config.mlp_activations,
      dtype=config.dtype,
      adapter=config.adapter,
      name='mlp',
    )(x, dropout)

  def _add(self, residual: Array, x: Array, dropout: Dropout) -> Array:
    return constrain(dropout(x) + residual, 'batch', 'length', 'embed')


class EncoderLayer(_Layer):
  """Self-attention and feed-forward, each normed before and added after."""

  @nn.compact
  def __call__(
    self, inputs: Array, bits: Array | None, mask: Array, bias: Array
  ) -> tuple[Array, None]:
    """Maps `[batch, length, embed]` to the same; None is for `nn.scan`."""
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
    """Maps `[batch, length, embed]` to the same; None is for `nn.scan`."""
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
  """What both stacks share."""

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
    """Applies layers to x; every layer sees the same context.

    Args:
      layer: one of them.
      num_layers: how many.
      fields: the layer's.
      x: `[batch, length, embed]`.
      bits: uint32 `[layers, batch, width]`, for dropout.
      *context: the layer's other arguments.
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
    """Draws what the layers' dropout needs; see `dropout.Dropout`.

    Args:
      num_layers: layers of the stack.
      x: `[batch, length, embed]`.
      key_lengths: of what each attention of a layer attends to.
      deterministic: whether dropout is off.

    Returns:
      uint32 `[layers, batch, width]`: for each attention its weights and its
      output, and for the feed-forward block what is inside and its output.
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
    """Drops whole features of an example: the mask is shared along length."""
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
      mask: bool `[batch, 1, length, length]`: which keys a query sees.
      deterministic: whether dropout is off.
    """
    config = self.config
    buckets = attention.relative_position_buckets(
      tokens.shape[-1], bidirectional=True
    )
    bias = attention.RelativePositionBias(config.num_heads, name='relpos_bias')(
      buckets
    )
    x = config.adapter.embed(self.embedder, tokens, config.vocab_size)
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
      adapter=config.adapter,
      name='logits_dense',
    )(y)

  def _advance(self) -> Array | None:
    """Counts a decoding step; None in the call that creates the cache."""
    exists = self.has_variable('cache', 'cache_index')
    index = self.variable('cache', 'cache_index', jnp.zeros, (), jnp.int32)
    if not exists:
      return None
    position = index.value
    index.value = position + 1
    return position


class Transformer(nn.Module):
  """T5 1.1, with the call interface of T5X's network.

  Token id 0 is padding. Positions are counted along the array: within a packed
  example their differences are right, and T5 uses nothing else, so the
  arguments `…_positions` are accepted and not needed.
  """

  config: T5Config

  def setup(self) -> None:
    """Makes the embeddings and both stacks."""
    config = self.config
    self.token_embedder = layers.Embed(
      config.vocab_size, config.emb_dim, config.dtype
    )
    self.encoder = Encoder(config, self.token_embedder)
    self.decoder = Decoder(config, self.token_embedder)

  @property
  def scan_layers(self) -> bool:
    """Whether cache leaves lead with a layer axis; T5X asks for this."""
    return self.config.scan_layers

  def encode(
    self,
    encoder_input_tokens: Array,
    encoder_segment_ids: Array | None = None,
    enable_dropout: bool = True,
  ) -> Array:
    """Maps tokens `[batch, length]` to `[batch, length, embed]`."""
    # T5X initialises its evaluation with float ids.
    tokens = encoder_input_tokens.astype(jnp.int32)
    mask = attention.pair_mask(tokens > 0, tokens > 0)
    if encoder_segment_ids is not None:
      mask &= attention.same_segment(encoder_segment_ids, encoder_segment_ids)
    return self.encoder(tokens, mask, not enable_dropout)

  def decode(
    self,
    encoded: Array,
    encoder_input_tokens: Array,
    decoder_input_tokens: Array,
    decoder_target_tokens: Array,
    encoder_segment_ids: Array | None = None,
    decoder_segment_ids: Array | None = None,
    decoder_positions: Array | None = None,
    enable_dropout: bool = True,
    decode: bool = False,
    max_decode_length: int | None = None,
  ) -> Array:
    """Returns float32 logits `[batch, length, vocab]`.

    Args:
      encoded: what `encode` returned, `[batch, encoder length, embed]`.
      encoder_input_tokens: `[batch, encoder length]`, for the padding mask.
      decoder_input_tokens: `[batch, length]`.
      decoder_target_tokens: `[batch, length]`, for the padding mask.
      encoder_segment_ids: `[batch, encoder length]` of a packed batch.
      decoder_segment_ids: `[batch, length]` of a packed batch.
      decoder_positions: not needed, see the class.
      enable_dropout: whether dropout is on.
      decode: autoregressive decoding. The first call, with the collection
        `cache` mutable and inputs of full length, only creates the cache; the
        later ones take one token each. If also `memory` is mutable in the first
        call and given to the later ones, these need no keys and values of the
        encoder's output, and may have several beams of each example as adjacent
        rows of the decoder's tokens.
      max_decode_length: length of the cache, needed by the later calls.

    Raises:
      ValueError: if decoding is given segment ids or a step no length, or only
        one side has segment ids.
    """
    del decoder_positions
    packed = encoder_segment_ids is not None
    if packed != (decoder_segment_ids is not None):
      raise ValueError('A packed batch has segment ids on both sides.')
    seen = encoder_input_tokens > 0
    if decode:
      if packed:
        raise ValueError('Packed batches cannot be decoded.')
      mask = None
      encoder_mask = seen[:, None, None, :]
    else:
      given = decoder_target_tokens > 0
      mask = attention.pair_mask(given, given)
      mask &= jnp.tri(given.shape[-1], dtype=bool)
      encoder_mask = attention.pair_mask(given, seen)
      if encoder_segment_ids is not None and decoder_segment_ids is not None:
        mask &= attention.same_segment(decoder_segment_ids, decoder_segment_ids)
        encoder_mask &= attention.same_segment(
          decoder_segment_ids, encoder_segment_ids
        )
    return self.decoder(
      encoded,
      encoder_mask,
      decoder_input_tokens.astype(jnp.int32),
      mask,
      deterministic=not enable_dropout,
      decode=decode,
      max_decode_length=max_decode_length,
    )

  def __call__(
    self,
    encoder_input_tokens: Array,
    decoder_input_tokens: Array,
    decoder_target_tokens: Array,
    encoder_segment_ids: Array | None = None,
    decoder_segment_ids: Array | None = None,
    encoder_positions: Array | None = None,
    decoder_positions: Array | None = None,
    *,
    enable_dropout: bool = True,
    decode: bool = False,
  ) -> Array:
    """Returns float32 logits `[batch, length, vocab]`; see `decode`."""
    del encoder_positions
    encoded = self.encode(
      encoder_input_tokens, encoder_segment_ids, enable_dropout
    )
    return self.decode(
      encoded,
      encoder_input_tokens,
      decoder_input_tokens,
      decoder_target_tokens,
      encoder_segment_ids=encoder_segment_ids,
      decoder_segment_ids=decoder_segment_ids,
      decoder_positions=decoder_positions,
      enable_dropout=enable_dropout,
      decode=decode,
    )
