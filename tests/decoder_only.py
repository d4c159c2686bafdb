"""Tiny decoder-only networks of each family, and Hugging Face's equal ones."""

import functools
from typing import Any

import numpy as np

from dst_t5x.core import parts
from dst_t5x.models import hugging_face
from dst_t5x.models.decoder_only import hf_config
from dst_t5x.models.decoder_only import hf_names
from dst_t5x.models.decoder_only import network

VOCAB = 60
_SIZES = {
  'vocab_size': VOCAB,
  'emb_dim': 24,
  'num_layers': 2,
  'num_heads': 4,
  'num_kv_heads': 2,
  'head_dim': 8,
  'mlp_dim': 20,
  'context_length': 128,
  'eos_id': 1,
}
_GEMMA = {
  'begin_id': 2,
  'norm_adds_one': True,
  'scale_embeddings': True,
  'mlp_activation': 'gelu',
}
_ROPE = network.Rope(1e6)
FAMILIES: dict[str, dict[str, Any]] = {
  'gemma': {**_GEMMA, 'num_kv_heads': 1},
  'gemma2': {
    **_GEMMA,
    'post_norms': True,
    'attention_logit_cap': 2.0,
    'logit_cap': 3.0,
    'sliding_window': 4,
    'local_layers': (True, False),
  },
  'gemma3': {
    **_GEMMA,
    'num_layers': 3,
    'post_norms': True,
    'query_key_norms': True,
    'sliding_window': 5,
    'local_layers': (True, True, False),
    'rope': network.Rope(1e6, factor=8.0),
    'local_rope': network.Rope(1e4),
    'query_scalar': 24.0,
  },
  'llama3': {
    'rope': network.Rope(5e5, 32.0, original_length=64),
    'norm_epsilon': 1e-5,
    'logits_via_embedding': False,
  },
  'qwen2': {'qkv_biases': True, 'rope': _ROPE},
  'qwen3': {'query_key_norms': True, 'rope': _ROPE, 'num_kv_heads': 4},
  'smollm2': {
    'num_heads': 3,
    'num_kv_heads': 1,
    'rope': network.Rope(1e5),
    'norm_epsilon': 1e-5,
    'eos_id': 0,
  },
}


def tiny(family: str, **changes: Any) -> network.Transformer:
  """Returns a network of some thousand parameters."""
  fields = {**_SIZES, **FAMILIES[family], **changes}
  return network.Transformer(network.DecoderConfig(**fields))


def random_params(model: network.Transformer, seed: int = 0) -> dict:
  """Returns params of which every tensor, norms and biases too, is random."""
  rng = np.random.default_rng(seed)
  flat = {}
  for tensor in hf_names.layout(model.config).values():
    x = rng.standard_normal(tensor.our_shape)
    if tensor.path.endswith('kernel'):
      x /= np.sqrt(tensor.our_shape[0])
    elif tensor.path.endswith('scale'):
      x = 0.3 * x + (not model.config.norm_adds_one)
    flat[tensor.path] = x.astype(np.float32)
  return parts.unflatten(flat)


def peer(model: network.Transformer, params: dict) -> Any:
  """Returns Hugging Face's model of a network, with the same weights."""
  import transformers

  content = hf_config.config_to_hf(model.config)
  config = transformers.AutoConfig.for_model(**content)
  config._attn_implementation = 'eager'
  other = getattr(transformers, content['architectures'][0])(config).eval()
  layout = hf_names.layout(model.config)
  assert {name for name, _ in other.named_parameters()} == layout.keys()
  copy_weights(other, layout, params)
  return other


def copy_weights(
  other: Any, layout: dict[str, hugging_face.Tensor], params: dict
) -> None:
  """Gives Hugging Face's model the weights of ours."""
  import torch

  flat = parts.flatten(params)
  with torch.no_grad():
    for name, parameter in other.named_parameters():
      array = flat[layout[name].path]
      array = array.T if layout[name].transposed else array
      parameter.copy_(torch.from_numpy(np.ascontiguousarray(array)))


@functools.cache
def pair(family: str) -> tuple[network.Transformer, dict, Any]:
  """Returns a network, its parameters, and Hugging Face's model of them."""
  model = tiny(family)
  params = random_params(model)
  return model, params, peer(model, params)
