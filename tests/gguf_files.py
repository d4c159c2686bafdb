"""Small GGUF files, written as llama.cpp's converter writes them."""

import json
import pathlib
from typing import Any

import decoder_only
import gguf
import numpy as np
import tokenizers
from tokenizers import models
from tokenizers import pre_tokenizers
from tokenizers import trainers

from dst_t5x.core import parts
from dst_t5x.models.decoder_only import hf_names
from dst_t5x.models.decoder_only import network

# Family of `decoder_only` -> architecture.
ARCHITECTURES = {
  'gemma2': 'gemma2',
  'gemma3': 'gemma3',
  'llama3': 'llama',
  'qwen2': 'qwen2',
  'qwen3': 'qwen3',
  'smollm2': 'llama',
}
TEXT = pathlib.Path(__file__).parent.parent.joinpath('README.md').read_text()
VOCAB = 400
_SPECIAL = ['<|end|>', '<|im_start|>', '<|im_end|>', '<pad>']
# Rows of a multiple of 32 entries, a block of most quantisations.
_SIZES = {
  'vocab_size': VOCAB,
  'emb_dim': 32,
  'num_heads': 4,
  'num_kv_heads': 2,
  'head_dim': 16,
  'mlp_dim': 64,
  'eos_id': 2,
}
# Transformers does not read the size of heads from files of Qwen's.
_CHANGES: dict[str, dict[str, Any]] = {
  'gemma2': {'begin_id': 1, 'query_scalar': 16.0},
  'gemma3': {
    'begin_id': 1,
    'query_scalar': 16.0,
    'num_layers': 7,
    'local_layers': (True, True, True, True, True, False),
  },
  'llama3': {'rope': network.Rope(5e5, 32.0, original_length=8192)},
  'qwen2': {'head_dim': 8},
  'qwen3': {'head_dim': 128},
}


def tiny(family: str) -> tuple[network.Transformer, dict]:
  """Returns a network, and random parameters."""
  changes = {**_SIZES, **_CHANGES.get(family, {})}
  model = decoder_only.tiny(family, **changes)
  return model, decoder_only.random_params(model)


def write(
  path: pathlib.Path,
  family: str,
  quantisation: str = 'F32',
  changes: dict[str, Any] | None = None,
) -> network.Transformer:
  """Writes a file; returns the network.

  Args:
    path: of the file.
    family: of `ARCHITECTURES`.
    quantisation: of all matrices but the embeddings, which have Q8_0 unless it
      is F32.
    changes: metadata to write otherwise; None for what to leave out.
  """
  model, params = tiny(family)
  architecture = ARCHITECTURES[family]
  metadata = {
    **_metadata(model.config, architecture),
    **tokenizer_metadata(family),
    **(changes or {}),
  }
  writer = gguf.GGUFWriter(path, metadata.pop('general.architecture'))
  for key, value in metadata.items():
    _add(writer, key, value)
  flat = parts.flatten(params)
  table = gguf.get_tensor_name_map(
    gguf.MODEL_ARCH[architecture.upper()], model.config.num_layers
  )
  for name, tensor in hf_names.layout(model.config).items():
    array = flat[tensor.path]
    array = np.ascontiguousarray(array.T if tensor.transposed else array)
    array = _as_llama_cpp_has_it(array, name, architecture, model.config)
    module, _, suffix = name.rpartition('.')
    kind = gguf.GGMLQuantizationType[
      'F32'
      if array.ndim < 2 or quantisation == 'F32'
      else 'Q8_0'
      if 'embed' in name
      else quantisation
    ]
    writer.add_tensor(
      f'{table.get_name(module)}.{suffix}',
      gguf.quants.quantize(array, kind),
      raw_dtype=kind,
    )
  if model.config.rope.original_length is not None:
    writer.add_tensor('rope_freqs.weight', _frequency_factors(model.config))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return model


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
  """Adds an entry with the type that llama.cpp gives it."""
  if value is None:
    return
  add = {
    bool: writer.add_bool,
    int: writer.add_uint32,
    float: writer.add_float32,
    str: writer.add_string,
    list: writer.add_array,
  }
  add[type(value)](key, value)


def _as_llama_cpp_has_it(
  array: np.ndarray,
  name: str,
  architecture: str,
  config: network.DecoderConfig,
) -> np.ndarray:
  """Returns a tensor changed as `convert_hf_to_gguf.py` does it."""
  if name.endswith('norm.weight') and architecture.startswith('gemma'):
    return array + np.float32(1)
  if architecture == 'llama' and ('q_proj' in name or 'k_proj' in name):
    heads = config.num_heads if 'q_proj' in name else config.num_kv_heads
    halves = array.reshape(heads, 2, array.shape[0] // heads // 2, -1)
    return halves.swapaxes(1, 2).reshape(array.shape)
  return array


def _frequency_factors(config: network.DecoderConfig) -> np.ndarray:
  """Returns `LlamaModel.generate_extra_tensors` of llama.cpp's converter."""
  factors = []
  for i in range(0, config.head_dim, 2):
    wavelength = 2 * np.pi * config.rope.theta ** (i / config.head_dim)
    length = config.rope.original_length
    if wavelength < length / 4:
      factors.append(1.0)
    elif wavelength > length / 1:
      factors.append(config.rope.factor)
    else:
      smooth = (length / wavelength - 1) / (4 - 1)
      factors.append(1 / ((1 - smooth) / config.rope.factor + smooth))
  return np.array(factors, np.float32)


def _metadata(
  config: network.DecoderConfig, architecture: str
) -> dict[str, Any]:
  """Returns what a file states of the network."""
  sizes: dict[str, Any] = {
    'context_length': config.context_length,
    'block_count': config.num_layers,
    'embedding_length': config.emb_dim,
    'feed_forward_length': config.mlp_dim,
    'attention.head_count': config.num_heads,
    'attention.head_count_kv': config.num_kv_heads,
    'attention.key_length': config.head_dim,
    'attention.value_length': config.head_dim,
    'attention.layer_norm_rms_epsilon': config.norm_epsilon,
    'rope.freq_base': config.rope.theta,
    'vocab_size': config.vocab_size,
  }
  if architecture == 'llama':
    sizes['rope.dimension_count'] = config.head_dim
  if config.attention_logit_cap:
    sizes['attn_logit_softcapping'] = config.attention_logit_cap
    sizes['final_logit_softcapping'] = config.logit_cap
  if architecture == 'gemma3':
    sizes['rope.scaling.type'] = 'linear'
    sizes['rope.scaling.factor'] = config.rope.factor
  if config.sliding_window:
    sizes['attention.sliding_window'] = config.sliding_window
  return {
    'general.architecture': architecture,
    'general.name': f'tiny {architecture}',
    **{f'{architecture}.{key}': value for key, value in sizes.items()},
  }


def tokenizer_metadata(family: str) -> dict[str, Any]:
  """Returns a tokenizer that was trained on README.md."""
  if family.startswith('gemma'):
    found = _gemma_tokens()
  else:
    found = _byte_level_tokens(family)
  found |= {f'{key}_token_id': 2 for key in ('eos', 'padding')}
  found |= {'bos_token_id': 1, 'unknown_token_id': 0}
  template = '{% for m in messages %}{{ m.content }}<|im_end|>\n{% endfor %}'
  return {
    **{f'tokenizer.ggml.{key}': value for key, value in found.items()},
    'tokenizer.chat_template': template,
  }


def _byte_level_tokens(family: str) -> dict[str, Any]:
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Digits(individual_digits=True),
      pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
  )
  trainer = trainers.BpeTrainer(
    vocab_size=VOCAB,
    special_tokens=_SPECIAL,
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  tokenizer.train_from_iterator(TEXT.splitlines(keepends=True), trainer)
  vocab = tokenizer.get_vocab()
  state = json.loads(tokenizer.to_str())
  return {
    'model': 'gpt2',
    'pre': {'llama3': 'llama-bpe', 'smollm2': 'smollm'}.get(family, 'qwen2'),
    'tokens': sorted(vocab, key=vocab.__getitem__),
    'token_type': [3 if i < len(_SPECIAL) else 1 for i in range(VOCAB)],
    'merges': [' '.join(pair) for pair in state['model']['merges']],
    'add_bos_token': family == 'llama3',
  }


def _gemma_tokens() -> dict[str, Any]:
  special = ['<unk>', '<bos>', '<eos>', '<mask>']
  some = [f'<0x{byte:02X}>' for byte in range(256)]
  words = ['▁▁', '▁t', 'he', '▁the', 'in', 'er', 'on', '▁a', 'ing', 'an', '▁th']
  letters = sorted(set(TEXT) - set(' \n'))
  tokens = [*special, *some, *words, '▁', *letters]
  tokens = [*tokens, *(f'<unused{i}>' for i in range(VOCAB - len(tokens)))]
  assert len(tokens) == VOCAB
  return {
    'model': 'llama',
    # Spaces alone are spelled with real ones.
    'tokens': ['  ' if token == '▁▁' else token for token in tokens],
    'scores': [-float(i) for i in range(VOCAB)],
    'token_type': [3] * 4 + [6] * 256 + [1] * (VOCAB - 260),
    'add_bos_token': True,
  }
