"""The layers of a decoder-only network, one by one or as one scan."""

from collections.abc import Sequence

from flax import linen as nn
from flax.linen import partitioning
import jax
import jax.numpy as jnp

from dst_t5x.models.decoder_only import attention
from dst_t5x.models.decoder_only import layers
from dst_t5x.models.decoder_only.config import DecoderConfig
from dst_t5x.models.dropout import Dropout

Array = jax.Array
Context = attention.Context


class Layer(nn.Module):
  """Self-attention and feed-forward, each normed before and added after."""

  config: DecoderConfig

  @nn.compact
  def __call__(
    self,
    inputs: Array,
    bits: Array | None,
    kind: Array | None,
    context: Context,
  ) -> tuple[Array, None]:
    """Maps `[batch, length, embed]` to the same; None is for `nn.scan`.

    Args:
      inputs: `[batch, length, embed]`.
      bits: uint32 `[batch, 2 · embed]`, for dropout.
      kind: int32 scalar, the kind of this layer, where `context` is stacked.
      context: of this layer, or those of all kinds, stacked on axis 0.
    """
    config = self.config
    if kind is not None:
      context = jax.tree.map(lambda x: x[kind], context)
    dropout = Dropout(config.dropout_rate, bits)
    x = norm(config, 'pre_self_attention_layer_norm')(inputs)
    x = attention.SelfAttention(config, name='self_attention')(x, context)
    if config.post_norms:
      x = norm(config, 'post_self_attention_layer_norm')(x)
    x = self._add(inputs, dropout(x))
    y = norm(config, 'pre_mlp_layer_norm')(x)
    y = layers.MlpBlock(
      config.mlp_dim, config.mlp_activation, config.dtype, name='mlp'
    )(y)
    if config.post_norms:
      y = norm(config, 'post_mlp_layer_norm')(y)
    y = self._add(x, dropout(y))
    dropout.end()
    return y, None

  def _add(self, residual: Array, x: Array) -> Array:
    return layers.constrain(x + residual, 'batch', 'length', 'embed')


class Decoder(nn.Module):
  """The stack of layers, and the output projection."""

  config: DecoderConfig
  embedder: layers.Embed

  @nn.compact
  def __call__(
    self, tokens: Array, contexts: Sequence[Context], deterministic: bool
  ) -> Array:
    """Returns float32 logits `[batch, length, vocab]`.

    Args:
      tokens: int32 `[batch, length]`.
      contexts: of each kind of layers; see `DecoderConfig.kinds`.
      deterministic: whether dropout is off.
    """
    config = self.config
    x = self.embedder(tokens)
    x = self._layers(x, self._bits(x, deterministic), contexts)
    x = norm(config, 'decoder_norm')(x)
    if config.logits_via_embedding:
      logits = self.embedder.attend(x)
    else:
      logits = layers.Dense(
        config.vocab_size, axes=('embed', 'vocab'), name='logits_dense'
      )(x)
    return layers.cap(logits, config.logit_cap)

  def _layers(
    self, x: Array, bits: Array | None, contexts: Sequence[Context]
  ) -> Array:
    """Applies the layers to x `[batch, length, embed]`."""
    config = self.config
    layer = Layer
    if config.remat:
      layer = partitioning.remat(layer, prevent_cse=not config.scan_layers)
    if config.scan_layers:
      stack = partitioning.scan_with_axes(
        layer,
        variable_axes={'params': 0, 'cache': 0, 'memory': 0},
        split_rngs={'params': True},
        in_axes=(0, 0, nn.broadcast),
        length=config.num_layers,
        axis_name='layers',
      )(config, name='layers')
      if len(contexts) == 1:
        return stack(x, bits, None, contexts[0])[0]
      # One program for all kinds of layers: each takes its own by its number.
      stacked = jax.tree.map(lambda *kinds: jnp.stack(kinds), *contexts)
      return stack(x, bits, jnp.asarray(config.kind_of_layers), stacked)[0]
    for i, kind in enumerate(config.kind_of_layers):
      of_layer = None if bits is None else bits[i]
      x, _ = layer(config, name=f'layers_{i}')(
        x, of_layer, None, contexts[kind]
      )
    return x

  def _bits(self, x: Array, deterministic: bool) -> Array | None:
    """Draws what dropout needs: uint32 `[layers, batch, 2 · embed]`."""
    config = self.config
    if deterministic or not config.dropout_rate:
      return None
    shape = config.num_layers, x.shape[0], 2 * config.emb_dim
    bits = jax.random.bits(self.make_rng('dropout'), shape)
    return layers.constrain(bits, 'layers', 'batch', None)


def norm(config: DecoderConfig, name: str) -> layers.RMSNorm:
  """Returns a norm over the embedding."""
  return layers.RMSNorm(
    config.norm_epsilon, config.norm_adds_one, dtype=config.dtype, name=name
  )
