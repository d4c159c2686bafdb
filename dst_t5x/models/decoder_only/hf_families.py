"""The families of decoder-only models, as Hugging Face's config.json has them.

A family is data: what is so in all of its models, what Transformers takes where
a config.json states nothing, and under which names.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

# Names of activations, and ours.
_SILU = {'silu': 'silu', 'swish': 'silu'}
_GELU = {'gelu_pytorch_tanh': 'gelu', 'gelu_new': 'gelu'}


@dataclasses.dataclass(frozen=True)
class Family:
  """What the models of a family share.

  Attributes:
    architecture: Transformers' class of the language model.
    options: fields of `DecoderConfig` that are the same in all its models.
    head_dim: where none is stated; None for hidden_size over heads.
    kv_heads_are_optional: whether heads of keys and values that are not stated
      are as many as those of queries.
    activation_key: under which the activation of the gate is stated.
    activations: what may be stated, and our name of it; the first is the
      default.
    tied: whether output projection and embedding are one by default.
    context_length: `max_position_embeddings` by default.
    eos_id: `eos_token_id` by default; None where it must be stated.
    begins: whether every text begins with `bos_token_id`. The tokenizer decides
      that, and of the family `llama` Llama 3's does while SmolLM2's does not:
      False leaves it to the model's gin file.
    caps: `attn_logit_softcapping` and `final_logit_softcapping` by default;
      None where the family does not know them.
    query_scalar: `query_pre_attn_scalar` by default; None as for `caps`.
    sliding_window: by default; 0 where the family has none.
    window_is_optional: whether `use_sliding_window` switches it on.
    period: every how manyth layer is global where `layer_types` is not stated;
      0 where `max_window_layers` says from which layer on all are local.
    theta: of RoPE by default.
    local_theta: of local layers by default; None where they have the same RoPE.
  """

  architecture: str
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  head_dim: int | None = None
  kv_heads_are_optional: bool = False
  activation_key: str = 'hidden_act'
  activations: Mapping[str, str] = dataclasses.field(
    default_factory=lambda: _SILU | _GELU
  )
  tied: bool = False
  context_length: int = 32_768
  eos_id: int | None = None
  begins: bool = False
  caps: tuple[float | None, float | None] | None = None
  query_scalar: float | None = None
  sliding_window: int = 0
  window_is_optional: bool = False
  period: int = 0
  theta: float = 10_000.0
  local_theta: float | None = None


_GEMMA: Mapping[str, Any] = {
  'head_dim': 256,
  'activations': _GELU | _SILU,
  'tied': True,
  'context_length': 8192,
  'eos_id': 1,
  'begins': True,
}
_GEMMA_OPTIONS = {'norm_adds_one': True, 'scale_embeddings': True}
_QWEN: Mapping[str, Any] = {'sliding_window': 4096, 'window_is_optional': True}

# By `model_type`.
FAMILIES: Mapping[str, Family] = {
  'gemma': Family(
    'GemmaForCausalLM',
    _GEMMA_OPTIONS,
    # Old files say `gelu` and mean the approximation.
    **{**_GEMMA, 'activations': {**_GELU, 'gelu': 'gelu', **_SILU}},
  ),
  'gemma2': Family(
    'Gemma2ForCausalLM',
    _GEMMA_OPTIONS | {'post_norms': True},
    **_GEMMA,
    activation_key='hidden_activation',
    caps=(50.0, 30.0),
    query_scalar=256.0,
    sliding_window=4096,
    period=2,
  ),
  'gemma3_text': Family(
    'Gemma3ForCausalLM',
    _GEMMA_OPTIONS | {'post_norms': True, 'query_key_norms': True},
    **{**_GEMMA, 'context_length': 131_072},
    activation_key='hidden_activation',
    caps=(None, None),
    query_scalar=256.0,
    sliding_window=4096,
    period=6,
    theta=1e6,
    local_theta=10_000.0,
  ),
  'llama': Family(
    'LlamaForCausalLM',
    kv_heads_are_optional=True,
    context_length=2048,
    eos_id=2,
  ),
  'qwen2': Family('Qwen2ForCausalLM', {'qkv_biases': True}, **_QWEN),
  'qwen3': Family(
    'Qwen3ForCausalLM', {'query_key_norms': True}, head_dim=128, **_QWEN
  ),
}
