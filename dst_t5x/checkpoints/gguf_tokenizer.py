"""The tokenizer of a GGUF file, as files of a Hugging Face folder.

A GGUF file lists the tokens, the merges and the special tokens. How texts are
normalised and cut before tokens are merged, it only names; the rules are those
of llama.cpp's `src/llama-vocab.cpp` and of the families' own tokenizer.json.
"""

from collections.abc import Mapping
import functools
from typing import Any

import tokenizers
from tokenizers import decoders
from tokenizers import models
from tokenizers import normalizers
from tokenizers import pre_tokenizers
from tokenizers import processors

from dst_t5x.core import json_object
from dst_t5x.core import json_text
from dst_t5x.core.errors import UserError, first_line

_PREFIX = 'tokenizer.ggml.'
_SPECIAL = {
  'bos_token': 'bos_token_id',
  'eos_token': 'eos_token_id',
  'unk_token': 'unknown_token_id',
  'pad_token': 'padding_token_id',
}
_CONTROL, _USER_DEFINED = 3, 4
_LLAMA3 = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
  r'| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)
_QWEN2 = _LLAMA3.replace('{1,3}', '')
_GEMMA = ('gemma2', 'gemma3')


def files(metadata: json_object.JsonObject) -> dict[str, bytes]:
  """Returns tokenizer.json, tokenizer_config.json and generation_config.json.

  Args:
    metadata: of a GGUF file.

  Raises:
    UserError: the tokenizer is damaged or of a kind that is not known.
  """
  tokens = _tokens(metadata)
  try:
    tokenizer = _tokenizer(metadata, tokens)
  except UserError:
    raise
  except Exception as e:  # The library raises nothing more special.
    raise UserError(
      f'{metadata.where}: its tokenizer is damaged: {first_line(e)}'
    ) from e
  config: dict[str, Any] = {
    'clean_up_tokenization_spaces': False,
    'model_max_length': metadata.size(
      f'{metadata.get("general.architecture", str)}.context_length'
    ),
    'tokenizer_class': 'PreTrainedTokenizerFast',
  }
  generation: dict[str, Any] = {}
  for name, key in _SPECIAL.items():
    number = _id(metadata, key, len(tokens))
    if number is not None:
      config[name] = tokens[number]
      generation[f'{name}_id'] = number
  generation.pop('unk_token_id', None)
  # A template has several lines.
  template = metadata.content.get('tokenizer.chat_template')
  if isinstance(template, str):
    config['chat_template'] = template
  return {
    'tokenizer.json': tokenizer.to_str(pretty=True).encode(),
    'tokenizer_config.json': _json(config),
    'generation_config.json': _json(generation),
  }


def _json(content: Mapping[str, Any]) -> bytes:
  return (json_text.dumps(content, indent=2) + '\n').encode()


def _tokens(metadata: json_object.JsonObject) -> list[str]:
  """Returns all tokens, in the order of their ids."""
  tokens = metadata.get(f'{_PREFIX}tokens', list)
  if not tokens or not all(isinstance(token, str) for token in tokens):
    raise UserError(f'{metadata.where}: {_PREFIX}tokens must be texts')
  return tokens


def _id(
  metadata: json_object.JsonObject, key: str, vocabulary: int
) -> int | None:
  """Returns the id of a special token; None if there is none."""
  number = metadata.get(f'{_PREFIX}{key}', int, None)
  if number is not None and not 0 <= number < vocabulary:
    raise metadata.refusal(
      f'{_PREFIX}{key}', f'must be one of the {vocabulary} tokens'
    )
  return number


def _tokenizer(
  metadata: json_object.JsonObject, tokens: list[str]
) -> tokenizers.Tokenizer:
  """Returns the tokenizer that the metadata describe."""
  kind = metadata.get(f'{_PREFIX}model', str)
  architecture = metadata.get('general.architecture', str)
  if kind == 'gpt2':
    tokenizer = _byte_level(metadata, tokens)
  elif kind == 'llama' and architecture in _GEMMA:
    tokenizer = _gemma(metadata, tokens)
  else:
    raise UserError(
      f'{metadata.where}: tokenizers of the kind {kind!r} are not known for the'
      f' architecture {architecture!r}'
    )
  types = metadata.get(f'{_PREFIX}token_type', list, [])
  for token, type_ in zip(tokens, types, strict=False):
    if type_ == _CONTROL:
      added = tokenizers.AddedToken(token, special=True, normalized=False)
      tokenizer.add_special_tokens([added])
    elif type_ == _USER_DEFINED:
      added = tokenizers.AddedToken(token, special=False, normalized=False)
      tokenizer.add_tokens([added])
  _add_ends(metadata, tokens, tokenizer)
  return tokenizer


def _add_ends(
  metadata: json_object.JsonObject,
  tokens: list[str],
  tokenizer: tokenizers.Tokenizer,
) -> None:
  """Puts the tokens before and behind texts that the metadata ask for."""
  # llama.cpp's defaults, for files that do not say.
  begins = metadata.content.get(f'{_PREFIX}model') == 'llama' or (
    metadata.content.get(f'{_PREFIX}pre') in ('llama3', 'llama-bpe')
  )
  before = _id(metadata, 'bos_token_id', len(tokens))
  behind = _id(metadata, 'eos_token_id', len(tokens))
  if not metadata.get(f'{_PREFIX}add_bos_token', bool, begins):
    before = None
  if not metadata.get(f'{_PREFIX}add_eos_token', bool, False):
    behind = None
  ends = [number for number in (before, behind) if number is not None]
  if not ends:
    return
  first, second = (
    [
      *([] if before is None else [f'{tokens[before]}:{which}']),
      f'${text}:{which}',
      *([] if behind is None else [f'{tokens[behind]}:{which}']),
    ]
    for which, text in enumerate('AB')
  )
  template = processors.TemplateProcessing(
    single=first,
    pair=[*first, *second],
    special_tokens=[(tokens[number], number) for number in ends],
  )
  tokenizer.post_processor = (
    template
    if tokenizer.post_processor is None
    else processors.Sequence([tokenizer.post_processor, template])
  )


def _byte_level(
  metadata: json_object.JsonObject, tokens: list[str]
) -> tokenizers.Tokenizer:
  """Returns byte-level BPE, as of GPT-2, Llama 3, Qwen and SmolLM."""
  merges = metadata.get(f'{_PREFIX}merges', list)
  vocab = {token: number for number, token in enumerate(tokens)}
  name = metadata.get(f'{_PREFIX}pre', str, 'default')
  if name not in _CUTS:
    raise UserError(
      f'{metadata.where}: {_PREFIX}pre is {name!r}, not one of'
      f' {", ".join(_CUTS)}'
    )
  tokenizer = tokenizers.Tokenizer(
    models.BPE(
      vocab=vocab,
      merges=[tuple(merge.split(' ')) for merge in merges],
      ignore_merges=name in ('llama3', 'llama-bpe'),
    )
  )
  if name == 'qwen2':
    tokenizer.normalizer = normalizers.NFC()
  tokenizer.pre_tokenizer = _CUTS[name]()
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
  return tokenizer


def _by_pattern(pattern: str) -> pre_tokenizers.PreTokenizer:
  return pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(tokenizers.Regex(pattern), behavior='isolated'),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )


def _by_digits() -> pre_tokenizers.PreTokenizer:
  return pre_tokenizers.Sequence(
    [
      pre_tokenizers.Digits(individual_digits=True),
      pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
  )


# `tokenizer.ggml.pre` -> how texts are cut before tokens are merged.
_CUTS: Mapping[str, Any] = {
  'gpt-2': functools.partial(pre_tokenizers.ByteLevel, add_prefix_space=False),
  'llama-bpe': functools.partial(_by_pattern, _LLAMA3),
  'llama3': functools.partial(_by_pattern, _LLAMA3),
  'qwen2': functools.partial(_by_pattern, _QWEN2),
  'smollm': _by_digits,
}


def _gemma(
  metadata: json_object.JsonObject, tokens: list[str]
) -> tokenizers.Tokenizer:
  """Returns Gemma's BPE of SentencePiece, with bytes for what is unknown."""
  # Pieces of spaces alone are spelled with real ones.
  spelled = [
    '▁' * len(token) if token and not token.strip(' ') else token
    for token in tokens
  ]
  vocab = {token: number for number, token in enumerate(spelled)}
  unknown = _id(metadata, 'unknown_token_id', len(tokens))
  tokenizer = tokenizers.Tokenizer(
    models.BPE(
      vocab=vocab,
      merges=_merges(vocab),
      unk_token=None if unknown is None else tokens[unknown],
      fuse_unk=True,
      byte_fallback=True,
    )
  )
  tokenizer.normalizer = normalizers.Replace(' ', '▁')
  tokenizer.pre_tokenizer = pre_tokenizers.Split(' ', 'merged_with_previous')
  tokenizer.decoder = decoders.Sequence(
    [decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse()]
  )
  return tokenizer


def _merges(vocab: Mapping[str, int]) -> list[tuple[str, str]]:
  """Returns the merges that a vocabulary implies, the earliest pieces first.

  SentencePiece merges any two pieces that make a third one. Among those that
  make the same one, the longest first piece goes first, as in Transformers.
  """
  merges = []
  for token in sorted(vocab, key=vocab.__getitem__):
    cuts = range(len(token) - 1, 0, -1)
    pairs = [(token[:i], token[i:]) for i in cuts]
    merges += [(a, b) for a, b in pairs if a in vocab and b in vocab]
  return merges
