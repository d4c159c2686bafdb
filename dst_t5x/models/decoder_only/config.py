"""Sizes and options of a decoder-only network."""

from collections.abc import Iterator, Sequence
import dataclasses
from typing import Any, Literal

import jax.numpy as jnp

from dst_t5x.core import values
from dst_t5x.core.errors import UserError
from dst_t5x.models import hugging_face
from dst_t5x.models.decoder_only.rope import Rope

_OF_RUNS = (*hugging_face.OF_RUNS, 'begin_id')


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """Sizes and options of the network; names as in T5X where it has the same.

  The defaults of the options are those of Llama; `gin/models/` has a file for
  each public model.

  Attributes:
    context_length: positions that the model is made for.
    num_kv_heads: heads of keys and values, each of which serves as many heads
      of queries (grouped-query attention).
    dtype: of the activations, float32 or bfloat16; parameters are float32, and
      so are norms, softmax and logits.
    mlp_activation: of the gate; `gelu` is the approximation by tanh.
    rope: rotary positions.
    local_rope: those of layers with a sliding window; None for the same.
    sliding_window: keys that a query of a local layer sees, itself included.
    local_layers: which layers have the sliding window, repeated over the
      layers: `(True, False)` for every other one, the first included.
    norm_epsilon: added to the mean square.
    norm_adds_one: whether norms multiply by 1 + scale.
    post_norms: whether attention and feed-forward block are normed before they
      are added, too.
    query_key_norms: whether queries and keys are normed in each head.
    qkv_biases: whether the maps to queries, keys and values have biases.
    query_scalar: queries are divided by its square root; None for head_dim.
    attention_logit_cap: c of c · tanh(x / c), over attention's logits.
    logit_cap: c of c · tanh(x / c), over the output's logits.
    scale_embeddings: whether embeddings are multiplied by √emb_dim.
    logits_via_embedding: whether the output projection is the embedding table.
    dropout_rate: of the outputs of attention and feed-forward block.
    begin_id: the token before every example; None where there is none.
    eos_id: the token that ends an example.
    scan_layers: whether the layers are one scan over parameters stacked on
      axis 0, which compiles the layer once.
    remat: whether the backward pass recomputes each layer from its input.
  """

  vocab_size: values.Positive
  emb_dim: values.Positive
  num_layers: values.Positive
  num_heads: values.Positive
  num_kv_heads: values.Positive
  head_dim: values.Positive
  mlp_dim: values.Positive
  context_length: values.Positive
  eos_id: values.Count
  begin_id: values.Count | None = None
  dtype: Literal['float32', 'bfloat16'] | jnp.dtype | type = jnp.float32
  mlp_activation: Literal['gelu', 'silu'] = 'silu'
  # Not a factory's: what makes a run is read from defaults.
  rope: Rope = Rope()  # noqa: RUF009
  local_rope: Rope | None = None
  sliding_window: values.Positive | None = None
  local_layers: Sequence[bool] = (False,)
  norm_epsilon: values.AboveZero = 1e-6
  norm_adds_one: bool = False
  post_norms: bool = False
  query_key_norms: bool = False
  qkv_biases: bool = False
  query_scalar: values.AboveZero | None = None
  attention_logit_cap: values.AboveZero | None = None
  logit_cap: values.AboveZero | None = None
  scale_embeddings: bool = False
  logits_via_embedding: bool = True
  dropout_rate: values.BelowOne = 0.0
  scan_layers: bool = False
  remat: bool = False

  def __post_init__(self) -> None:
    values.check_fields(self)
    # A list from gin; `jit` hashes us.
    object.__setattr__(self, 'local_layers', tuple(self.local_layers))
    if self.num_heads % self.num_kv_heads:
      raise UserError(
        f'num_heads {self.num_heads} must be a multiple of num_kv_heads'
        f' {self.num_kv_heads}'
      )
    if self.head_dim % 2:
      raise UserError(
        f'head_dim must be even for rotary positions, it is {self.head_dim}'
      )
    if not self.local_layers:
      raise UserError('local_layers must say of at least one layer what it is')
    if any(self.local_layers) and self.sliding_window is None:
      raise UserError('local_layers needs a sliding_window')

  @property
  def is_local(self) -> tuple[bool, ...]:
    """Whether each layer has the sliding window."""
    pattern = self.local_layers
    return tuple(pattern[i % len(pattern)] for i in range(self.num_layers))

  @property
  def kinds(self) -> tuple[tuple[Rope, int | None], ...]:
    """The kinds of layers: their rotary positions and their window."""
    kinds = {
      False: (self.rope, None),
      True: (self.local_rope or self.rope, self.sliding_window),
    }
    return tuple(kinds[is_local] for is_local in sorted(set(self.is_local)))

  @property
  def kind_of_layers(self) -> tuple[int, ...]:
    """The kind of each layer, an index into `kinds`."""
    kinds = sorted(set(self.is_local))
    return tuple(kinds.index(is_local) for is_local in self.is_local)


def differing(one: DecoderConfig, other: DecoderConfig) -> Iterator[str]:
  """Yields the fields in which two networks differ, causes before effects.

  Fields of how a network runs are left out. Two values that mean the same, such
  as a `query_scalar` of None and of head_dim, do not differ.
  """
  names = [field.name for field in dataclasses.fields(DecoderConfig)]
  for name in ['local_layers', *names]:
    if name not in _OF_RUNS and _meaning(one, name) != _meaning(other, name):
      yield name


def _meaning(config: DecoderConfig, name: str) -> Any:
  """Returns a field's value, the same where the network is."""
  values: dict[str, Any] = {
    'local_layers': config.is_local,
    'query_scalar': float(config.query_scalar or config.head_dim),
  }
  if not any(config.is_local):
    values |= {'local_rope': None, 'sliding_window': None}
  elif name == 'local_rope':
    return config.local_rope or config.rope
  return values.get(name, getattr(config, name))
