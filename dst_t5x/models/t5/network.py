"""The T5 1.1 encoder-decoder.

Raffel et al. 2020, "Exploring the Limits of Transfer Learning with a Unified
Text-to-Text Transformer", with the changes of version 1.1: gated GELU and an
untied output projection. Parameter paths, shapes and call interface are those
of T5X's `t5x.examples.t5.network`. T5X's checkpoints therefore load by name,
and T5X itself can train this network.
"""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any, ClassVar

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dst_t5x.core import stable_ids
from dst_t5x.models import api
from dst_t5x.models import teacher_forcing
from dst_t5x.models.t5 import attention
from dst_t5x.models.t5 import features
from dst_t5x.models.t5 import layers
from dst_t5x.models.t5 import own_tensors
from dst_t5x.models.t5 import stacks
from dst_t5x.models.t5.config import T5Config

Array = jax.Array

__all__ = ['T5Config', 'Transformer']


@stable_ids.called('t5_1_1')
class Transformer(nn.Module, teacher_forcing.TeacherForced):
  """T5 1.1, with the call interface of T5X's network.

  Token id 0 is padding. The arguments `…_positions` are ignored: T5 uses only
  differences of positions, and these are the same along a packed row as within
  each of its examples.
  """

  inputs: ClassVar[tuple[str, ...]] = features.INPUTS

  config: T5Config

  def setup(self) -> None:
    """Creates the embeddings and both stacks."""
    config = self.config
    self.token_embedder = layers.Embed(
      config.vocab_size, config.emb_dim, config.dtype
    )
    self.encoder = stacks.Encoder(config, self.token_embedder)
    self.decoder = stacks.Decoder(config, self.token_embedder)

  @property
  def scan_layers(self) -> bool:
    """Whether axis 0 of parameters and cache is the layer; read by T5X too."""
    return self.config.scan_layers

  def encode(
    self,
    encoder_input_tokens: Array,
    encoder_segment_ids: Array | None = None,
    enable_dropout: bool = True,
  ) -> Array:
    """Maps tokens `[batch, length]` to `[batch, length, embed]`."""
    # T5X initialises evaluation with float ids.
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
      decoder_positions: ignored, see the class.
      enable_dropout: whether dropout is on.
      decode: whether to decode step by step. The first call needs a mutable
        collection `cache` and inputs of full length, and only creates the
        cache. Each later call takes one token. If `memory` is mutable in the
        first call and passed to the later ones, these reuse the keys and values
        of the encoder's output. They may then have several beams of each
        example, as adjacent rows of the decoder's tokens.
      max_decode_length: length of the cache, needed by the later calls.

    Raises:
      ValueError: decoding has segment ids, a decoding step has no
        `max_decode_length`, or only one side has segment ids.
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

  @property
  def vocab_size(self) -> int:
    """See `api.Network`."""
    return self.config.vocab_size

  @property
  def activation_dtype(self) -> Any:
    """See `api.Network`."""
    return self.config.dtype

  @property
  def output_matrix(self) -> str | None:
    """See `api.Network`."""
    is_tied = self.config.logits_via_embedding
    return None if is_tied else 'decoder/logits_dense/kernel'

  @property
  def remat(self) -> bool:
    """See `api.Network`."""
    return self.config.remat

  @nn.nowrap
  def initialize(self, key: Array) -> Any:
    """See `api.Network`."""
    tokens = jnp.ones((1, 2), jnp.int32)
    return self.init(key, tokens, tokens, tokens, enable_dropout=False)

  @nn.nowrap
  def feature_converter(self, pack: bool, prefix: Sequence[int] = ()) -> Any:
    """See `api.Network`."""
    from dst_t5x.models.t5 import converter  # Imports TensorFlow.

    return converter.FeatureConverter(prefix, pack=pack)

  @nn.nowrap
  def batch_shapes(
    self, feature_lengths: Mapping[str, int], rows: int, pack: bool
  ) -> api.Shapes:
    """See `api.Network`."""
    return features.batch_shapes(feature_lengths, rows, pack)

  @nn.nowrap
  def prompt(self, example: Mapping[str, Any]) -> Any:
    """See `api.Network`."""
    return example['encoder_input_tokens']

  @nn.nowrap
  def prompt_of_inputs(self, inputs: Any, prefix: Sequence[int] = ()) -> Any:
    """See `api.Network`."""
    return np.concatenate([np.array(prefix, np.int32), inputs])

  @nn.nowrap
  def start_decoding(
    self, params: Any, prompts: Array, beams: int, max_decode_length: int
  ) -> api.DecodingStart:
    """See `api.Network`."""
    return _start_decoding(self, params, prompts, beams, max_decode_length)

  @nn.nowrap
  def own_tensors(self, tensors: Any) -> Any:
    """See `api.Network`."""
    return own_tensors.interceptor(tensors)

  @nn.nowrap
  def work_of_example(
    self, shapes: Mapping[str, Any], feature_lengths: Mapping[str, int]
  ) -> api.Work:
    """See `api.Network`."""
    return features.work_of_example(shapes, feature_lengths)

  @nn.nowrap
  def share(self, devices: int) -> 'Transformer':
    """See `api.Network`."""
    sizes = {
      name: getattr(self.config, name) // devices
      for name in ('num_heads', 'mlp_dim', 'vocab_size')
      if getattr(self.config, name) % devices == 0
    }
    return Transformer(dataclasses.replace(self.config, **sizes))

  @nn.nowrap
  def with_remat(self, remat: bool, layers: int | None = None) -> 'Transformer':
    """See `api.Network`."""
    config = dataclasses.replace(self.config, remat=remat)
    if layers is not None:
      config = dataclasses.replace(
        config,
        num_encoder_layers=layers,
        num_decoder_layers=layers,
        scan_layers=False,
      )
    return Transformer(config)

  @nn.nowrap
  def with_layers(self, layers: int) -> 'Transformer':
    """See `api.Network`."""
    config = dataclasses.replace(
      self.config, num_encoder_layers=layers, num_decoder_layers=layers
    )
    return Transformer(config)


def _start_decoding(
  network: Transformer,
  params: Any,
  prompts: Array,
  beams: int,
  max_decode_length: int,
) -> api.DecodingStart:
  """Encodes the prompts and stores the result's keys and values."""
  variables = {'params': params}
  encoded = network.apply(
    variables, prompts, enable_dropout=False, method='encode'
  )
  # Only this call's cache and memory are used. XLA removes all other work.
  blank = jnp.ones((beams * prompts.shape[0], max_decode_length), jnp.int32)
  _, created = network.apply(
    variables,
    encoded,
    prompts,
    blank,
    blank,
    enable_dropout=False,
    decode=True,
    mutable=['cache', 'memory'],
    method='decode',
  )

  def step(tokens: Array, cache: Any) -> tuple[Array, Any]:
    logits, updated = network.apply(
      {**variables, 'memory': created['memory'], 'cache': cache},
      encoded,
      prompts,
      tokens[:, None],
      tokens[:, None],
      enable_dropout=False,
      decode=True,
      max_decode_length=max_decode_length,
      mutable=['cache'],
      method='decode',
    )
    return logits[:, 0], updated['cache']

  # Every target begins with token 0.
  first = jnp.zeros(len(blank), jnp.int32)
  batch_axis = int(network.scan_layers)
  return api.DecodingStart(step, created['cache'], batch_axis, first)
