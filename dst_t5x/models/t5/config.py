"""Sizes and options of T5 1.1."""

from collections.abc import Sequence
import dataclasses
from typing import Literal

import jax.numpy as jnp

from dst_t5x.core import values


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

  def __post_init__(self) -> None:
    values.check_fields(self)
    if isinstance(self.mlp_activations, list):  # From gin; `jit` hashes us.
      activations = tuple(self.mlp_activations)
      object.__setattr__(self, 'mlp_activations', activations)
