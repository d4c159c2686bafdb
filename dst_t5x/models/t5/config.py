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
    dtype: the activations' dtype, float32 or bfloat16; parameters are float32.
    mlp_activations: one activation, or two for a gated block. Each is the name
      of a function in `flax.linen`, or 'linear'.
    logits_via_embedding: whether the output projection is the table of
      embeddings.
    float32_attention_logits: whether attention logits are computed in float32
      even if activations are bfloat16. The softmax is always float32.
    scan_layers: whether a stack is one scan over parameters stacked on axis 0,
      so that the layer is compiled once.
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
    # Gin passes lists; `jit` needs a hash.
    if isinstance(self.mlp_activations, list):
      activations = tuple(self.mlp_activations)
      object.__setattr__(self, 'mlp_activations', activations)
