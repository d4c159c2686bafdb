"""Names and shapes of a Hugging Face T5 1.1 model's tensors, and ours.

Linear layers are stored as [out, in] there and as [in, out] in T5X, relative
positions as [buckets, heads] and [heads, buckets].
"""

from collections.abc import Iterator
import re

from dst_t5x.models import hugging_face
from dst_t5x.models.t5.config import T5Config

EMBEDDING = 'shared.weight'
HEAD = 'lm_head.weight'
# Some files hold the shared table once more for each stack, or under one of
# these names only: `safetensors.torch.save_model` keeps the first in the
# alphabet of several names.
COPIES = ('encoder.embed_tokens.weight', 'decoder.embed_tokens.weight')
# Left over from T5 1.0 in old files; transformers ignores it by name as well.
UNUSED = re.compile(
  r'decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight'
)

# Names of a layer's blocks: theirs, ours, and our layer norm before it.
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


def _tensor(path: str, shape: tuple[int, ...]) -> hugging_face.Tensor:
  transposed = len(shape) == 2 and not path.endswith('/embedding')
  return hugging_face.Tensor(path, shape, transposed)


def layout(
  config: T5Config, num_buckets: int
) -> dict[str, hugging_face.Tensor]:
  """Returns every tensor of a T5 1.1 model under Hugging Face's name."""
  table = (config.vocab_size, config.emb_dim)
  tensors = {
    EMBEDDING: _tensor('token_embedder/embedding', table),
    HEAD: _tensor('decoder/logits_dense/kernel', table),
  }
  stacks = (
    ('encoder', config.num_encoder_layers),
    ('decoder', config.num_decoder_layers),
  )
  for stack, num_layers in stacks:
    tensors[f'{stack}.final_layer_norm.weight'] = _tensor(
      f'{stack}/{stack}_norm/scale', (config.emb_dim,)
    )
    first = f'{stack}.block.0.layer.0.SelfAttention'
    tensors[f'{first}.relative_attention_bias.weight'] = _tensor(
      f'{stack}/relpos_bias/rel_embedding', (num_buckets, config.num_heads)
    )
    for layer in range(num_layers):
      for number, (theirs, ours, norm) in enumerate(_BLOCKS[stack]):
        block = f'{stack}.block.{layer}.layer.{number}'
        prefix = f'{stack}/layers_{layer}'
        tensors[f'{block}.layer_norm.weight'] = _tensor(
          f'{prefix}/{norm}/scale', (config.emb_dim,)
        )
        for their, our, shape in _kernels(theirs, config):
          tensors[f'{block}.{theirs}.{their}.weight'] = _tensor(
            f'{prefix}/{ours}/{our}/kernel', shape
          )
  return tensors


def linear_map(path: str) -> str:
  """Returns their name of a linear map, which is that of its weight's module.

  Args:
    path: ours of its module, such as `encoder/layers_0/attention/query`.
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
  block: str, config: T5Config
) -> Iterator[tuple[str, str, tuple[int, int]]]:
  """Yields their name, our name and their shape of a block's kernels."""
  if block == 'DenseReluDense':
    yield 'wi_0', 'wi_0', (config.mlp_dim, config.emb_dim)
    yield 'wi_1', 'wi_1', (config.mlp_dim, config.emb_dim)
    yield 'wo', 'wo', (config.emb_dim, config.mlp_dim)
  else:
    joined = config.num_heads * config.head_dim
    for name in ('query', 'key', 'value'):
      yield name[0], name, (joined, config.emb_dim)
    yield 'o', 'out', (config.emb_dim, joined)
