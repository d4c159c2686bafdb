"""Names and shapes of the tensors of Hugging Face's checkpoints, and ours.

Linear layers are stored as [out, in] there and as [in, out] here. All families
use the same names; which tensors there are follows from the options.
"""

from collections.abc import Collection, Iterator
import re
from typing import TYPE_CHECKING

from dst_t5x.models.hugging_face import Tensor

if TYPE_CHECKING:  # It imports JAX; names are also read without.
  from dst_t5x.models.decoder_only.config import DecoderConfig

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
_LINEAR_PARTS = {'weight': 'kernel', 'bias': 'bias'}
_THEIRS = re.compile(r'model\.layers\.(\d+)\.([\w.]+)\.(weight|bias)')
_OUTSIDE = {
  EMBEDDING: 'token_embedder/embedding',
  'model.norm.weight': 'decoder/decoder_norm/scale',
  HEAD: 'decoder/logits_dense/kernel',
}


def has_post_norms(names: Collection[str]) -> bool:
  """Returns whether a model with these tensors has norms after its blocks."""
  return 'model.layers.0.pre_feedforward_layernorm.weight' in names


def path_of(name: str, post_norms: bool) -> str | None:
  """Returns our path of a tensor; None if no model here has such a tensor.

  Args:
    name: theirs, such as `model.layers.0.self_attn.q_proj.weight`.
    post_norms: whether there are norms after the blocks, too, which changes
      what `post_attention_layernorm` means.
  """
  if name in _OUTSIDE:
    return _OUTSIDE[name]
  found = _THEIRS.fullmatch(name)
  if not found:
    return None
  layer, module, kind = found.groups()
  prefix = f'decoder/layers_{layer}'
  if module in (linear := _ATTENTION | _MLP):
    return f'{prefix}/{linear[module]}/{_LINEAR_PARTS[kind]}'
  norms = (_POST_NORMS if post_norms else _NORMS) | _QUERY_KEY_NORMS
  if module in norms and kind == 'weight':
    return f'{prefix}/{norms[module]}/scale'
  return None


def transposed(path: str) -> bool:
  """Returns whether a tensor of this path has its axes the other way round."""
  return path.endswith('/kernel')


def layout(config: 'DecoderConfig') -> dict[str, Tensor]:
  """Returns every tensor of a model under Hugging Face's name."""
  table = (config.vocab_size, config.emb_dim)
  shapes: dict[str, tuple[int, ...]] = {EMBEDDING: table}
  for layer in range(config.num_layers):
    for name, shape in _of_layer(config):
      shapes[f'model.layers.{layer}.{name}'] = shape
  shapes['model.norm.weight'] = (config.emb_dim,)
  if not config.logits_via_embedding:
    shapes[HEAD] = table
  tensors = {}
  for name, shape in shapes.items():
    path = path_of(name, config.post_norms)
    assert path is not None, name
    tensors[name] = Tensor(path, shape, transposed(path))
  return tensors


def copies(config: 'DecoderConfig') -> dict[str, str]:
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
  config: 'DecoderConfig',
) -> Iterator[tuple[str, tuple[int, ...]]]:
  """Yields name and shape of a layer's tensors, as they have them."""
  for norm in _POST_NORMS if config.post_norms else _NORMS:
    yield f'{norm}.weight', (config.emb_dim,)
  joined = config.num_heads * config.head_dim
  few = config.num_kv_heads * config.head_dim
  widths = {'query': joined, 'key': few, 'value': few}
  for their, our in _ATTENTION.items():
    width = widths.get(our.rpartition('/')[2])
    if width is None:
      yield f'{their}.weight', (config.emb_dim, joined)
      continue
    yield f'{their}.weight', (width, config.emb_dim)
    if config.qkv_biases:
      yield f'{their}.bias', (width,)
  if config.query_key_norms:
    for their in _QUERY_KEY_NORMS:
      yield f'{their}.weight', (config.head_dim,)
  for their, our in _MLP.items():
    shape = (config.mlp_dim, config.emb_dim)
    yield f'{their}.weight', shape[::-1] if our == 'mlp/wo' else shape
