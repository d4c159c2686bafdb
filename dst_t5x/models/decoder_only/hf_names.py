"""Names and shapes of the tensors of Hugging Face's checkpoints, and ours.

Linear layers are stored as [out, in] there and as [in, out] here. All families
use the same names; which tensors there are follows from the options.
"""

from collections.abc import Iterator
import re

from dst_t5x.models.decoder_only.config import DecoderConfig
from dst_t5x.models.hugging_face import Tensor

EMBEDDING = 'model.embed_tokens.weight'
HEAD = 'lm_head.weight'
# What old files hold besides: RoPE's frequencies, which follow from the config.
UNUSED = re.compile(r'model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq')

# Their name of a linear map, and ours.
_ATTENTION = {
  'self_attn.q_proj': 'self_attention/query',
  'self_attn.k_proj': 'self_attention/key',
  'self_attn.v_proj': 'self_attention/value',
  'self_attn.o_proj': 'self_attention/out',
}
_MLP = {
  'mlp.gate_proj': 'mlp/wi_0',
  'mlp.up_proj': 'mlp/wi_1',
  'mlp.down_proj': 'mlp/wo',
}
# Their name of a layer's norm, and ours.
_NORMS = {
  'input_layernorm': 'pre_self_attention_layer_norm',
  'post_attention_layernorm': 'pre_mlp_layer_norm',
}
# With norms after the blocks, too, the second name means another one.
_POST_NORMS = {
  'input_layernorm': 'pre_self_attention_layer_norm',
  'post_attention_layernorm': 'post_self_attention_layer_norm',
  'pre_feedforward_layernorm': 'pre_mlp_layer_norm',
  'post_feedforward_layernorm': 'post_mlp_layer_norm',
}
_QUERY_KEY_NORMS = {
  'self_attn.q_norm': 'self_attention/query_norm',
  'self_attn.k_norm': 'self_attention/key_norm',
}
_LINEAR = re.compile(r'decoder/layers_(\d+)/(\w+/\w+)')


def layout(config: DecoderConfig) -> dict[str, Tensor]:
  """Returns every tensor of a model under Hugging Face's name."""
  table = (config.vocab_size, config.emb_dim)
  tensors = {EMBEDDING: Tensor('token_embedder/embedding', table)}
  for layer in range(config.num_layers):
    for their, our, shape in _of_layer(config):
      tensors[f'model.layers.{layer}.{their}'] = Tensor(
        f'decoder/layers_{layer}/{our}', shape, our.endswith('/kernel')
      )
  tensors['model.norm.weight'] = Tensor(
    'decoder/decoder_norm/scale', (config.emb_dim,)
  )
  if not config.logits_via_embedding:
    tensors[HEAD] = Tensor('decoder/logits_dense/kernel', table, True)
  return tensors


def copies(config: DecoderConfig) -> dict[str, str]:
  """Returns names under which a file may hold a tensor once more."""
  return {HEAD: EMBEDDING} if config.logits_via_embedding else {}


def linear_map(path: str) -> str:
  """Returns their name of a linear map, which is that of its weight's module.

  Args:
    path: ours of its module, such as `decoder/layers_0/self_attention/query`.
  """
  found = _LINEAR.fullmatch(path)
  if not found:
    return HEAD.removesuffix('.weight')
  layer, ours = found.groups()
  names = {our: their for their, our in (_ATTENTION | _MLP).items()}
  return f'model.layers.{layer}.{names[ours]}'


def _of_layer(
  config: DecoderConfig,
) -> Iterator[tuple[str, str, tuple[int, ...]]]:
  """Yields their name, our name and their shape of a layer's tensors."""
  norms = _POST_NORMS if config.post_norms else _NORMS
  for their, our in norms.items():
    yield f'{their}.weight', f'{our}/scale', (config.emb_dim,)
  joined = config.num_heads * config.head_dim
  few = config.num_kv_heads * config.head_dim
  widths = {'query': joined, 'key': few, 'value': few}
  for their, our in _ATTENTION.items():
    width = widths.get(our.rpartition('/')[2])
    if width is None:
      yield f'{their}.weight', f'{our}/kernel', (config.emb_dim, joined)
      continue
    yield f'{their}.weight', f'{our}/kernel', (width, config.emb_dim)
    if config.qkv_biases:
      yield f'{their}.bias', f'{our}/bias', (width,)
  if config.query_key_norms:
    for their, our in _QUERY_KEY_NORMS.items():
      yield f'{their}.weight', f'{our}/scale', (config.head_dim,)
  for their, our in _MLP.items():
    shape = (config.mlp_dim, config.emb_dim)
    shape = shape[::-1] if our == 'mlp/wo' else shape
    yield f'{their}.weight', f'{our}/kernel', shape
