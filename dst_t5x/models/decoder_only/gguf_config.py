"""Decoder-only models in GGUF files: what Hugging Face's files would state.

llama.cpp converts Hugging Face's models. Its metadata state what config.json
states, except what llama.cpp takes for granted; some tensors are changed, which
is undone here.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

import numpy as np

from dst_t5x.core import json_object
from dst_t5x.core.errors import UserError
from dst_t5x.models.decoder_only import hf_families
from dst_t5x.models.decoder_only.config import DecoderConfig
from dst_t5x.models.decoder_only.rope import Rope


@dataclasses.dataclass(frozen=True)
class Architecture:
  """What is so in all GGUF files of an architecture.

  Attributes:
    model_type: of Hugging Face's config.json.
    permutes: whether the weights of queries and keys have their rows in another
      order, for RoPE on neighbouring components.
    layers_of_27b: number of layers of the size whose queries are divided by
      √(embed / heads) instead of √head_dim, which the files do not state.
    has_windows: whether there are layers with a sliding window.
  """

  model_type: str
  permutes: bool = False
  layers_of_27b: int = 0
  has_windows: bool = False


# By `general.architecture`: those that Transformers, the judge, reads as well.
ARCHITECTURES: Mapping[str, Architecture] = {
  'gemma2': Architecture('gemma2', layers_of_27b=46, has_windows=True),
  'gemma3': Architecture('gemma3_text', layers_of_27b=62, has_windows=True),
  'llama': Architecture('llama', permutes=True),
  'qwen2': Architecture('qwen2'),
  'qwen3': Architecture('qwen3'),
}
# What each frequency of Llama 3's RoPE is divided by.
FREQUENCIES = 'rope_freqs.weight'
_EMBEDDING, _HEAD = 'token_embd.weight', 'output.weight'
# Llama 3's low and high frequency factors and its original length. No file
# states them.
_LLAMA3 = (1.0, 4.0, 8192)
_LOCAL, _GLOBAL = 'sliding_attention', 'full_attention'


def config_of(
  metadata: json_object.JsonObject,
  shapes: Mapping[str, tuple[int, ...]],
  frequency_factors: np.ndarray | None = None,
) -> dict[str, Any]:
  """Returns the config.json of the model in a file.

  Args:
    metadata: of the file, whose architecture is one of `ARCHITECTURES`.
    shapes: of the file's tensors.
    frequency_factors: the tensor `FREQUENCIES`, `[head_dim / 2]`, if there.

  Raises:
    UserError: something is missing, or the network here lacks what is stated.
  """
  stated = _Metadata(metadata)
  architecture = ARCHITECTURES[stated.architecture]
  if len(table := shapes.get(_EMBEDDING, ())) != 2:
    raise UserError(f'{metadata.where} lacks the matrix {_EMBEDDING}')
  heads = stated.size('attention.head_count')
  content = {
    'model_type': architecture.model_type,
    'vocab_size': table[0],
    'hidden_size': stated.size('embedding_length'),
    'intermediate_size': stated.size('feed_forward_length'),
    'num_hidden_layers': stated.size('block_count'),
    'num_attention_heads': heads,
    'num_key_value_heads': stated.size('attention.head_count_kv', heads),
    'head_dim': _head_dim(stated, heads),
    'max_position_embeddings': stated.size('context_length'),
    'rms_norm_eps': stated.number('attention.layer_norm_rms_epsilon'),
    'tie_word_embeddings': _HEAD not in shapes,
  }
  for token in ('bos', 'eos'):
    key = f'tokenizer.ggml.{token}_token_id'
    content[f'{token}_token_id'] = metadata.get(key, int, None)
  content |= _attention(stated, architecture, content)
  return content | _rope(stated, content['head_dim'], frequency_factors)


def as_hugging_face_has_it(
  architecture: str, config: DecoderConfig, name: str, array: np.ndarray
) -> np.ndarray:
  """Returns a tensor of a file as Hugging Face's files hold it.

  Args:
    architecture: `general.architecture` of the file.
    config: of the network.
    name: Hugging Face's, of the tensor.
    array: the tensor in the file.
  """
  if config.norm_adds_one and name.endswith('norm.weight'):
    return array - np.float32(1)
  if ARCHITECTURES[architecture].permutes and name.endswith(
    ('q_proj.weight', 'k_proj.weight')
  ):
    # Components i and i + head_dim / 2, which rotate together, are neighbours.
    pairs = array.reshape(-1, config.head_dim // 2, 2, array.shape[-1])
    return pairs.swapaxes(1, 2).reshape(array.shape)
  return array


class _Metadata:
  """Reads the metadata of the file's own architecture."""

  def __init__(self, metadata: json_object.JsonObject) -> None:
    self.where = metadata.where
    self.architecture = metadata.get('general.architecture', str)
    self._metadata = metadata

  def get(self, key: str, kind: type, default: Any) -> Any:
    return self._metadata.get(f'{self.architecture}.{key}', kind, default)

  def size(self, key: str, *default: Any) -> int:
    return self._metadata.size(f'{self.architecture}.{key}', *default)

  def number(self, key: str, *default: Any) -> Any:
    return self._metadata.get(f'{self.architecture}.{key}', float, *default)

  def refusal(self, key: str, must: str) -> UserError:
    return self._metadata.refusal(f'{self.architecture}.{key}', must)


def _head_dim(stated: _Metadata, heads: int) -> int:
  """Returns the size of heads; refuses heads with several sizes."""
  default = stated.size('embedding_length') // heads
  head_dim = stated.size('attention.key_length', default)
  for key, why in (
    ('attention.value_length', ''),
    ('rope.dimension_count', ': partial RoPE is not known here'),
  ):
    if stated.size(key, head_dim) != head_dim:
      raise stated.refusal(key, f'must be the size of heads, {head_dim}{why}')
  return head_dim


def _attention(
  stated: _Metadata, architecture: Architecture, content: Mapping[str, Any]
) -> dict[str, Any]:
  """Returns caps, the scale of queries and sliding windows.

  Args:
    stated: the metadata.
    architecture: what is taken for granted.
    content: the sizes, as config.json has them.
  """
  if stated.get('expert_count', int, 0):
    raise stated.refusal(
      'expert_count', 'must be 0: a mixture of experts is not known here'
    )
  family = hf_families.FAMILIES[architecture.model_type]
  found: dict[str, Any] = {}
  if family.caps is not None:
    for key, cap in zip(('attn', 'final'), family.caps, strict=True):
      key += '_logit_softcapping'
      found[key] = stated.number(key, cap)
  layers, heads = content['num_hidden_layers'], content['num_attention_heads']
  if family.query_scalar is not None:
    is_27b = layers == architecture.layers_of_27b
    found['query_pre_attn_scalar'] = (
      content['hidden_size'] // heads if is_27b else content['head_dim']
    )
  key = 'attention.sliding_window'
  if not architecture.has_windows:
    if stated.get(key, int, 0):
      raise stated.refusal(key, f'is not known of {stated.architecture}')
    return found
  found['sliding_window'] = stated.size(key)
  period = stated.size(f'{key}_pattern', family.period)
  found['layer_types'] = [
    _LOCAL if (i + 1) % period else _GLOBAL for i in range(layers)
  ]
  return found


def _rope(
  stated: _Metadata, head_dim: int, factors: np.ndarray | None
) -> dict[str, Any]:
  """Returns rotary positions, as config.json has them."""
  theta = stated.number('rope.freq_base', 10_000.0)
  found: dict[str, Any] = {'rope_theta': theta}
  if local := stated.number('rope.freq_base_swa', None):
    found['rope_local_base_freq'] = local
  kind = stated.get('rope.scaling.type', str, 'none')
  factor = stated.number('rope.scaling.factor', 1.0)
  if kind != 'none':
    found['rope_scaling'] = {'rope_type': kind, 'factor': factor}
  if factors is None:
    return found
  low, high, length = _LLAMA3
  factor = float(factors.max())
  scaled = Rope(theta, factor, length, low, high).frequencies(head_dim)
  plain = Rope(theta).frequencies(head_dim)
  wanted = plain / scaled
  is_llama3 = factors.shape == wanted.shape and np.allclose(
    factors, wanted, rtol=1e-3
  )
  if not is_llama3 or kind != 'none':
    raise UserError(
      f"{stated.where}: {FREQUENCIES} is not that of Llama 3's scaled rotary"
      ' positions, and no others are known here'
    )
  found['rope_scaling'] = {
    'rope_type': 'llama3',
    'factor': factor,
    'low_freq_factor': low,
    'high_freq_factor': high,
    'original_max_position_embeddings': length,
  }
  return found
