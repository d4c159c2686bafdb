"""A decoder-only language model: Gemma, Llama, Qwen and those like them.

One network with options, `config.DecoderConfig`; the families differ in these
and in the names of their checkpoints. Parameters are named as in T5X's
`t5x.examples.decoder_only.network`.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import math
from typing import Any, ClassVar

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dst_t5x.core import stable_ids
from dst_t5x.models import api
from dst_t5x.models import teacher_forcing
from dst_t5x.models.decoder_only import attention
from dst_t5x.models.decoder_only import decoding
from dst_t5x.models.decoder_only import features
from dst_t5x.models.decoder_only import layers
from dst_t5x.models.decoder_only import slots
from dst_t5x.models.decoder_only import stack
from dst_t5x.models.decoder_only.config import DecoderConfig
from dst_t5x.models.decoder_only.rope import Rope

Array = jax.Array

__all__ = ['DecoderConfig', 'Rope', 'Transformer']


@stable_ids.called('decoder_only')
class Transformer(nn.Module, teacher_forcing.TeacherForced):
  """A decoder-only language model.

  Any token id may be a real token: padding is at the end of a row, where no
  token sees it, and in prompts it is `pad_id`.
  """

  inputs: ClassVar[tuple[str, ...]] = features.INPUTS

  config: DecoderConfig

  def setup(self) -> None:
    """Makes the embeddings and the stack."""
    config = self.config
    self.token_embedder = layers.Embed(
      config.vocab_size,
      config.emb_dim,
      config.dtype,
      scale=self.embedding_scale,
    )
    self.decoder = stack.Decoder(config, self.token_embedder)

  def __call__(
    self,
    decoder_input_tokens: Array,
    decoder_segment_ids: Array | None = None,
    decoder_positions: Array | None = None,
    *,
    enable_dropout: bool = False,
  ) -> Array:
    """Returns float32 logits `[batch, length, vocab]`.

    Args:
      decoder_input_tokens: int32 `[batch, length]`.
      decoder_segment_ids: int32 `[batch, length]` of a packed batch.
      decoder_positions: int32 `[batch, length]`, which restart with every
        segment; needed if and only if there are segments.
      enable_dropout: whether dropout is on.

    Raises:
      ValueError: there are segments without positions, or the reverse.
    """
    if (decoder_segment_ids is None) != (decoder_positions is None):
      raise ValueError('A packed batch has segment ids and positions.')
    places = jnp.arange(decoder_input_tokens.shape[-1])[None]
    same = None
    if (ids := decoder_segment_ids) is not None:
      same = ids[:, :, None] == ids[:, None, :]
    positions = places if decoder_positions is None else decoder_positions
    contexts = self._contexts(positions, places, places, same)
    return self.decoder(decoder_input_tokens, contexts, not enable_dropout)

  def decode(
    self,
    tokens: Array,
    positions: Array,
    key_positions: Array,
    is_token: Array,
    step: Array | None = None,
  ) -> Array:
    """Returns float32 logits `[rows, length, vocab]` of a part of a row.

    Without a step the tokens are a prompt, whose keys and values are left in
    the collection `memory`, which must be mutable. A step reads them, and adds
    to `cache`.

    Args:
      tokens: int32 `[rows, length]`.
      positions: theirs, int32 `[rows, length]`.
      key_positions: of the prompt, and in a step of the whole cache as well,
        int32 `[rows, keys]`.
      is_token: bool `[rows, keys]`, which keys are no padding.
      step: the place in the cache, int32 scalar, or of each row int32
        `[rows]`.
    """
    contexts = self._contexts(
      positions, positions, key_positions, is_token[:, None], step
    )
    return self.decoder(tokens, contexts, deterministic=True)

  def _contexts(
    self,
    positions: Array,
    query: Array,
    key: Array,
    is_there: Array | None,
    step: Array | None = None,
  ) -> list[attention.Context]:
    """Returns what each kind of layers knows of the tokens.

    Args:
      positions: of the tokens in their example, int32 `[batch, length]`.
      query: int32 `[batch, length]`, places that are compared with those of
        keys.
      key: places of the keys, int32 `[batch, keys]`.
      is_there: see `attention.visible`.
      step: see `decode`.
    """
    return [
      attention.Context(
        rope.rotations(positions, self.config.head_dim),
        attention.visible(query, key, is_there, window),
        step,
      )
      for rope, window in self.config.kinds
    ]

  @property
  def vocab_size(self) -> int:
    """See `api.Network`."""
    return self.config.vocab_size

  @property
  def pad_id(self) -> int:
    """See `api.Network`."""
    return features.PADDING

  @property
  def eos_id(self) -> int:
    """See `api.Network`."""
    return self.config.eos_id

  @property
  def begin_id(self) -> int | None:
    """See `api.Network`."""
    return self.config.begin_id

  @property
  def embedding_scale(self) -> float:
    """See `api.Network`."""
    is_scaled = self.config.scale_embeddings
    return float(np.sqrt(np.float32(self.config.emb_dim))) if is_scaled else 1.0

  @property
  def scan_layers(self) -> bool:
    """See `api.Network`."""
    return self.config.scan_layers

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
    return self.init(key, tokens, mutable=['params', 'params_axes'])

  @nn.nowrap
  def feature_converter(self, pack: bool, prefix: Sequence[int] = ()) -> Any:
    """See `api.Network`."""
    from dst_t5x.models.decoder_only import converter  # TensorFlow.

    return converter.FeatureConverter(
      features.Layout.of(self.config, prefix), pack=pack
    )

  @nn.nowrap
  def batch_shapes(
    self, feature_lengths: Mapping[str, int], rows: int, pack: bool
  ) -> api.Shapes:
    """See `api.Network`."""
    return features.batch_shapes(self.config, feature_lengths, rows, pack)

  @nn.nowrap
  def prompt(self, example: Mapping[str, Any]) -> Any:
    """See `api.Network`."""
    is_prompt = np.asarray(example['decoder_causal_attention']) > 0
    return np.where(is_prompt, example['decoder_input_tokens'], self.pad_id)

  @nn.nowrap
  def prompt_of_inputs(self, inputs: Any, prefix: Sequence[int] = ()) -> Any:
    """See `api.Network`."""
    return features.Layout.of(self.config, prefix).prompt(np.asarray(inputs))

  @nn.nowrap
  def start_decoding(
    self, params: Any, prompts: Array, beams: int, max_decode_length: int
  ) -> api.DecodingStart:
    """See `api.Network`."""
    return decoding.start(
      self.config, self.apply, params, prompts, beams, max_decode_length
    )

  @nn.nowrap
  def slots(self, params: Any, length: int) -> api.Slots:
    """See `api.Network`."""
    return slots.Slots(self.config, self.apply, params, length)

  @nn.nowrap
  def work_of_example(
    self, shapes: Mapping[str, Any], feature_lengths: Mapping[str, int]
  ) -> api.Work:
    """See `api.Network`."""
    return features.work_of_example(self.config, shapes, feature_lengths)

  @nn.nowrap
  def share(self, devices: int) -> 'Transformer':
    """See `api.Network`."""
    config = self.config
    sizes = {
      name: getattr(config, name) // devices
      for name in ('num_heads', 'mlp_dim', 'vocab_size')
      if getattr(config, name) % devices == 0
    }
    if heads := sizes.get('num_heads'):
      # Each device has the heads of keys and values that its queries need.
      kv_heads, left = divmod(config.num_kv_heads, devices)
      sizes['num_kv_heads'] = (
        math.gcd(heads, config.num_kv_heads) if left else kv_heads
      )
    return Transformer(dataclasses.replace(config, **sizes))

  @nn.nowrap
  def with_remat(self, remat: bool, layers: int | None = None) -> 'Transformer':
    """See `api.Network`."""
    config = dataclasses.replace(self.config, remat=remat)
    if layers is not None:
      config = dataclasses.replace(config, num_layers=layers, scan_layers=False)
    return Transformer(config)

  @nn.nowrap
  def with_layers(self, layers: int) -> 'Transformer':
    """See `api.Network`."""
    return Transformer(dataclasses.replace(self.config, num_layers=layers))
