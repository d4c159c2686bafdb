"""Maps the tensors of a Hugging Face T5 1.1 model to T5X's paths.

Hugging Face stores linear maps as [out, in] and relative positions as [buckets,
heads]. T5X stores them transposed.
"""

from collections.abc import Iterator
import re
from typing import TYPE_CHECKING

from dst_t5x.models import hugging_face

if TYPE_CHECKING:  # It imports JAX; names are also read without.
  from dst_t5x.models.t5.config import T5Config

EMBEDDING = 'shared.weight'
HEAD = 'lm_head.weight'
# Some files have copies of the shared table under these names, or have only one
# of them: `safetensors.torch.save_model` keeps the alphabetically first name.
COPIES = ('encoder.embed_tokens.weight', 'decoder.embed_tokens.weight')
# Old files have this leftover of T5 1.0. Transformers also ignores it by name.
UNUSED = re.compile(
  r'decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight'
)

# A layer's blocks: Hugging Face's name, T5X's name, T5X's layer norm before it.
_ENCODER_BLOCKS = (
  ('SelfAttention', 'attention', 'pre_attention_layer_norm'),
  ('DenseReluDense', 'mlp', 'pre_mlp_layer_norm'),
)
_DECODER_BLOCKS = (
  ('SelfAttention', 'self_attention', 'pre_self_attention_layer_norm'),
  (
    'EncDecAttention',
    'encoder_decoder_attention',
    'pre_cross_attention_layer_norm',
  ),
  ('DenseReluDense', 'mlp', 'pre_mlp_layer_norm'),
)
_BLOCKS = {'encoder': _ENCODER_BLOCKS, 'decoder': _DECODER_BLOCKS}
_LINEAR = re.compile(r'(encoder|decoder)/layers_(\d+)/(\w+)/(\w+)')
_THEIRS = re.compile(
  r'(encoder|decoder)\.block\.(\d+)\.layer\.(\d+)\.(\w+)(?:\.(\w+))?\.weight'
)
_ATTENTION = {'q': 'query', 'k': 'key', 'v': 'value', 'o': 'out'}
_MLP = {'wi_0': 'wi_0', 'wi_1': 'wi_1', 'wo': 'wo'}
_OUTSIDE = {
  EMBEDDING: 'token_embedder/embedding',
  HEAD: 'decoder/logits_dense/kernel',
  'encoder.final_layer_norm.weight': 'encoder/encoder_norm/scale',
  'decoder.final_layer_norm.weight': 'decoder/decoder_norm/scale',
}
_RELATIVE = 'relative_attention_bias'


def path_of(name: str) -> str | None:
  """Returns T5X's path of a tensor; None if T5 1.1 has no such tensor.

  Args:
    name: Hugging Face's, such as
      `encoder.block.0.layer.0.SelfAttention.q.weight`.
  """
  if name in _OUTSIDE:
    return _OUTSIDE[name]
  found = _THEIRS.fullmatch(name)
  if not found:
    return None
  stack, layer, number, theirs, inner = found.groups()
  if int(number) >= len(_BLOCKS[stack]):
    return None
  block, ours, norm = _BLOCKS[stack][int(number)]
  prefix = f'{stack}/layers_{layer}'
  if (theirs, inner) == ('layer_norm', None):
    return f'{prefix}/{norm}/scale'
  if theirs != block:
    return None
  if (inner, layer, number) == (_RELATIVE, '0', '0'):
    return f'{stack}/relpos_bias/rel_embedding'
  kernel = (_MLP if ours == 'mlp' else _ATTENTION).get(inner)
  return None if kernel is None else f'{prefix}/{ours}/{kernel}/kernel'


def transposed(path: str) -> bool:
  """Returns whether a tensor of this path has its axes the other way round."""
  return path.endswith(('/kernel', '/rel_embedding'))


def _tensor(name: str, shape: tuple[int, ...]) -> hugging_face.Tensor:
  path = path_of(name)
  assert path is not None, name
  return hugging_face.Tensor(path, shape, transposed(path))


def layout(
  config: 'T5Config', num_buckets: int
) -> dict[str, hugging_face.Tensor]:
  """Returns Hugging Face's name -> tensor, for a whole T5 1.1 model."""
  table = (config.vocab_size, config.emb_dim)
  shapes: dict[str, tuple[int, ...]] = {EMBEDDING: table, HEAD: table}
  stacks = (
    ('encoder', config.num_encoder_layers),
    ('decoder', config.num_decoder_layers),
  )
  for stack, num_layers in stacks:
    shapes[f'{stack}.final_layer_norm.weight'] = (config.emb_dim,)
    first = f'{stack}.block.0.layer.0.SelfAttention'
    shapes[f'{first}.{_RELATIVE}.weight'] = (num_buckets, config.num_heads)
    for layer in range(num_layers):
      for number, (block, _, _) in enumerate(_BLOCKS[stack]):
        prefix = f'{stack}.block.{layer}.layer.{number}'
        shapes[f'{prefix}.layer_norm.weight'] = (config.emb_dim,)
        for kernel, shape in _kernels(block, config):
          shapes[f'{prefix}.{block}.{kernel}.weight'] = shape
  return {name: _tensor(name, shape) for name, shape in shapes.items()}


def linear_map(path: str) -> str:
  """Returns Hugging Face's name of a linear map's module.

  Args:
    path: T5X's path of the module, such as `encoder/layers_0/attention/query`.
  """
  found = _LINEAR.fullmatch(path)
  if not found:
    return HEAD.removesuffix('.weight')
  stack, layer, block, name = found.groups()
  number, theirs = next(
    (number, theirs)
    for number, (theirs, ours, _) in enumerate(_BLOCKS[stack])
    if ours == block
  )
  name = name if block == 'mlp' else name[0]
  return f'{stack}.block.{layer}.layer.{number}.{theirs}.{name}'


def _kernels(
  block: str, config: 'T5Config'
) -> Iterator[tuple[str, tuple[int, int]]]:
  """Yields a block's kernels: Hugging Face's name, [out, in]."""
  if block == 'DenseReluDense':
    yield 'wi_0', (config.mlp_dim, config.emb_dim)
    yield 'wi_1', (config.mlp_dim, config.emb_dim)
    yield 'wo', (config.emb_dim, config.mlp_dim)
  else:
    joined = config.num_heads * config.head_dim
    for name in ('q', 'k', 'v'):
      yield name, (joined, config.emb_dim)
    yield 'o', (config.emb_dim, joined)
