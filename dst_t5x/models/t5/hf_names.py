"""Names and shapes of a Hugging Face T5 1.1 model's tensors, and ours.

Linear layers are stored as [out, in] there and as [in, out] in T5X, relative
positions as [buckets, heads] and [heads, buckets].
"""

from collections.abc import Iterator
import math
import re
import typing

from dst_t5x.models.t5 import network

EMBEDDING = 'shared.weight'
HEAD = 'lm_head.weight'

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


class Tensor(typing.NamedTuple):
  """A tensor of a Hugging Face model.

  Attributes:
    path: its place in our tree.
    shape: as they store it.
  """

  path: str
  shape: tuple[int, ...]

  @property
  def transposed(self) -> bool:
    """Whether ours has the axes the other way round."""
    return len(self.shape) == 2 and not self.path.endswith('/embedding')

  @property
  def our_shape(self) -> tuple[int, ...]:
    """Its shape in our tree."""
    return self.shape[::-1] if self.transposed else self.shape

  @property
  def num_bytes(self) -> int:
    """Its bytes in float32."""
    return 4 * math.prod(self.shape)


def layout(config: network.T5Config, num_buckets: int) -> dict[str, Tensor]:
  """Returns every tensor of a T5 1.1 model under Hugging Face's name."""
  table = (config.vocab_size, config.emb_dim)
  tensors = {
    EMBEDDING: Tensor('token_embedder/embedding', table),
    HEAD: Tensor('decoder/logits_dense/kernel', table),
  }
  stacks = (
    ('encoder', config.num_encoder_layers),
    ('decoder', config.num_decoder_layers),
  )
  for stack, num_layers in stacks:
    tensors[f'{stack}.final_layer_norm.weight'] = Tensor(
      f'{stack}/{stack}_norm/scale', (config.emb_dim,)
    )
    first = f'{stack}.block.0.layer.0.SelfAttention'
    tensors[f'{first}.relative_attention_bias.weight'] = Tensor(
      f'{stack}/relpos_bias/rel_embedding', (num_buckets, config.num_heads)
    )
    for layer in range(num_layers):
      for number, (theirs, ours, norm) in enumerate(_BLOCKS[stack]):
        block = f'{stack}.block.{layer}.layer.{number}'
        prefix = f'{stack}/layers_{layer}'
        tensors[f'{block}.layer_norm.weight'] = Tensor(
          f'{prefix}/{norm}/scale', (config.emb_dim,)
        )
        for their, our, shape in _kernels(theirs, config):
          tensors[f'{block}.{theirs}.{their}.weight'] = Tensor(
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
  block: str, config: network.T5Config
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
