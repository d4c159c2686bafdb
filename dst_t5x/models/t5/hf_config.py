"""Reads and writes the config.json of a Hugging Face T5 1.1 model.

Every key that changes the computation is either read, or must have the value
that this network has. Other keys, such as the length of a summary, are ignored.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

from dst_t5x.core import json_object
from dst_t5x.core.errors import UserError
from dst_t5x.models.t5.config import T5Config

ARCHITECTURE = 'T5ForConditionalGeneration'

# Key -> the values that this network has. Transformers has the same default for
# a missing key.
_FIXED: Mapping[str, tuple[Any, ...]] = {
  'relative_attention_max_distance': (128,),
  'layer_norm_epsilon': (1e-6,),
  # The token ids of the data and of the decoders.
  'decoder_start_token_id': (0,),
  'eos_token_id': (1, [1]),
  'pad_token_id': (0,),
  # Keys that replace weights, or change them after loading.
  'pruned_heads': ({},),
  'quantization_config': (),
  'tie_encoder_decoder': (False,),
  'transformers_weights': (),
}
# Transformers accepts both names, and writes the left one.
_ALIASES = {
  'd_kv': 'head_dim',
  'd_model': 'hidden_size',
  'num_heads': 'num_attention_heads',
  'num_layers': 'num_hidden_layers',
}
# Transformers' names of the tanh approximation of GELU, which T5 1.1 uses.
_GELU = ('gelu_new', 'gelu_pytorch_tanh')
# A limit, because the names of all tensors are made before any is read.
_MOST_LAYERS = 10_000


@dataclasses.dataclass(frozen=True)
class Config:
  """The content of a config.json.

  Attributes:
    network: the network's sizes.
    num_buckets: the number of relative position buckets. This network has 32;
      the shape check refuses the parameters of any other number.
    head_may_be_embedding: whether the embedding is the output projection if the
      folder has none.
  """

  network: T5Config
  num_buckets: int
  head_may_be_embedding: bool


def read(stated: json_object.JsonObject) -> Config:
  """Returns the content of a config.json.

  Raises:
    UserError: it is damaged, or not of a T5 1.1 model.
  """
  _check_fixed(stated)
  _check_feed_forward(stated)
  tied = stated.get('tie_word_embeddings', bool, True)
  # Transformers 5 states tied embeddings for every T5. Only
  # `scale_decoder_outputs` tells whether they are.
  scaled = stated.get('scale_decoder_outputs', bool, None)
  if stated.content.get('model_type') == 'mt5':
    scaled = False  # mT5 never has it, and states tied embeddings, too.
  if tied if scaled is None else scaled:
    key = 'tie_word_embeddings' if scaled is None else 'scale_decoder_outputs'
    raise _other_model(
      stated,
      f'has {key} {json_object.shown(stated.content.get(key))}, which ties the'
      ' output projection to the embeddings (T5 1.0); take a google/t5-v1_1'
      ' model',
    )
  num_buckets = stated.size('relative_attention_num_buckets', 32)
  return Config(_network(stated), num_buckets, head_may_be_embedding=tied)


def stated(config: T5Config, num_buckets: int) -> dict[str, Any]:
  """Returns the content of config.json for a network.

  Raises:
    UserError: the network is not a T5 1.1.
  """
  if tuple(config.mlp_activations) != ('gelu', 'linear'):
    raise UserError(
      f'no T5 1.1 model: mlp_activations {tuple(config.mlp_activations)}'
    )
  if config.logits_via_embedding:
    raise UserError('no T5 1.1 model: logits_via_embedding is set')
  return {
    'architectures': [ARCHITECTURE],
    'd_ff': config.mlp_dim,
    'd_kv': config.head_dim,
    'd_model': config.emb_dim,
    'decoder_start_token_id': 0,
    'dropout_rate': config.dropout_rate,
    'eos_token_id': 1,
    'feed_forward_proj': 'gated-gelu',
    'initializer_factor': 1.0,
    'is_encoder_decoder': True,
    'layer_norm_epsilon': 1e-6,
    'model_type': 't5',
    'num_decoder_layers': config.num_decoder_layers,
    'num_heads': config.num_heads,
    'num_layers': config.num_encoder_layers,
    'pad_token_id': 0,
    'relative_attention_max_distance': 128,
    'relative_attention_num_buckets': num_buckets,
    'tie_word_embeddings': False,
    'torch_dtype': 'float32',
    'use_cache': True,
    'vocab_size': config.vocab_size,
  }


def _check_fixed(stated: json_object.JsonObject) -> None:
  """Raises UserError if a key has a value that this network does not have."""
  for key, known in _FIXED.items():
    value = stated.content.get(key)
    if value is None:
      continue
    # Types must match too: `true` is not 1.
    if not any(type(value) is type(one) and value == one for one in known):
      wanted = f'not {known[0]!r}' if known else 'which is not known here'
      raise _other_model(
        stated, f'has {key} {json_object.shown(value)}, {wanted}'
      )


def _check_feed_forward(stated: json_object.JsonObject) -> None:
  """Raises UserError unless the feed-forward block is a gated GELU."""
  name = stated.get('feed_forward_proj', str, 'relu')
  gate, _, activation = name.rpartition('-')
  activation = 'gelu_new' if name == 'gated-gelu' else activation
  # In Transformers, these two keys take precedence.
  found = stated.get('dense_act_fn', str, activation)
  is_gated = stated.get('is_gated_act', bool, gate == 'gated')
  for key, is_known in (
    ('dense_act_fn', found in _GELU),
    ('is_gated_act', is_gated),
  ):
    if is_known:
      continue
    value = stated.content.get(key)
    if value is None:
      key, value = 'feed_forward_proj', name
    raise _other_model(
      stated, f"has {key} {json_object.shown(value)}, T5 1.1 has 'gated-gelu'"
    )


def _network(stated: json_object.JsonObject) -> T5Config:
  """Returns the network's sizes."""
  sizes = {name: _size(stated, name) for name in _ALIASES}
  encoder_layers = sizes['num_layers']
  decoder_layers = stated.size(
    'num_decoder_layers', encoder_layers, most=_MOST_LAYERS
  )
  dropout_rate = stated.get('dropout_rate', float, 0.1)
  if not 0 <= dropout_rate < 1:
    raise stated.refusal('dropout_rate', 'must be in [0, 1)')
  return T5Config(
    vocab_size=stated.size('vocab_size'),
    emb_dim=sizes['d_model'],
    num_heads=sizes['num_heads'],
    num_encoder_layers=encoder_layers,
    num_decoder_layers=decoder_layers,
    head_dim=sizes['d_kv'],
    mlp_dim=stated.size('d_ff'),
    mlp_activations=('gelu', 'linear'),
    dropout_rate=dropout_rate,
    logits_via_embedding=False,
  )


def _size(stated: json_object.JsonObject, name: str) -> int:
  """Returns a size that has two names.

  Raises:
    UserError: it is missing or invalid, or the names have different values.
  """
  most = _MOST_LAYERS if name == 'num_layers' else json_object.LARGEST
  other = stated.size(_ALIASES[name], None, most=most)
  if other is None:
    return stated.size(name, most=most)
  size = stated.size(name, other, most=most)
  if other != size:
    raise stated.refusal(_ALIASES[name], f"must be {name}'s {size}")
  return size


def _other_model(stated: json_object.JsonObject, why: str) -> UserError:
  folder, _, file = stated.where.rpartition('/')
  return UserError(f'{folder} is no T5 1.1 model: its {file} {why}')
