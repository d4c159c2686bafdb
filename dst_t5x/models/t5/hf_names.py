"""Maps the tensors of a Hugging Face T5 1.1 model to T5X's paths.

Hugging Face stores linear maps as [out, in] and relative positions as [buckets,
heads]. T5X stores them transposed.
"""

from collections.abc import Iterator
import re

from dst_t5x.models import hugging_face
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


def _tensor(path: str, shape: tuple[int, ...]) -> hugging_face.Tensor:
  transposed = len(shape) == 2 and not path.endswith('/embedding')
  return hugging_face.Tensor(path, shape, transposed)


def layout(
  config: T5Config, num_buckets: int
) -> dict[str, hugging_face.Tensor]:
  """Returns Hugging Face's name -> tensor, for a whole T5 1.1 model."""
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
  block: str, config: T5Config
) -> Iterator[tuple[str, str, tuple[int, int]]]:
  """Yields a block's kernels: Hugging Face's name, T5X's name, [out, in]."""
  if block == 'DenseReluDense':
    yield 'wi_0', 'wi_0', (config.mlp_dim, config.emb_dim)
    yield 'wi_1', 'wi_1', (config.mlp_dim, config.emb_dim)
    yield 'wo', 'wo', (config.emb_dim, config.mlp_dim)
  else:
    joined = config.num_heads * config.head_dim
    for name in ('query', 'key', 'value'):
      yield name[0], name, (joined, config.emb_dim)
    yield 'o', 'out', (config.emb_dim, joined)
