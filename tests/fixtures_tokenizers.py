"""Folders of tokenizers as tuned models of four families have them.

They are trained on names of languages, countries and currencies in a dozen
languages, which Babel has. Import the fixture into the tests that need it.
"""

import functools
import io
import json

import babel
import pytest
import tokenizers
from tokenizers import decoders
from tokenizers import models
from tokenizers import normalizers
from tokenizers import pre_tokenizers
from tokenizers import processors
from tokenizers import trainers

LANGUAGES = ('de', 'en', 'fr', 'ru', 'ja', 'ar', 'hi', 'zh', 'el', 'ko', 'tr')
KINDS = ('smollm2', 'llama3', 'qwen3', 'gemma')
VOCABULARY_SIZE = 1500

_IM = ('<|endoftext|>', '<|im_start|>', '<|im_end|>')
_HEADERS = ('<|start_header_id|>', '<|end_header_id|>')
_LLAMA3 = ('<|begin_of_text|>', '<|end_of_text|>', *_HEADERS, '<|eot_id|>')
_THINK = ('<think>', '</think>')
_TURNS = ('<start_of_turn>', '<end_of_turn>')

_TEXT = {
  'smollm2': """{% for message in messages %}{% if loop.first and \
messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are a helpful assistant<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}""",
  'llama3': """{{- bos_token }}
{%- if not date_string is defined %}
  {%- set date_string = strftime_now("%d %b %Y") %}
{%- endif %}
{%- set ns = namespace(system='') %}
{%- for message in messages %}
  {%- if message['role'] == 'system' %}
    {%- set ns.system = message['content'] | trim %}
    {%- continue %}
  {%- endif %}
  {%- if loop.first or ns.system %}
    {{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: ' }}
    {{- date_string + '\\n\\n' + ns.system + '<|eot_id|>' }}
    {%- set ns.system = '' %}
  {%- endif %}
  {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
  {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
  {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
""",
  'qwen3': """{%- if tools %}{{- tools | tojson }}{%- endif %}
{%- for message in messages %}
  {{- '<|im_start|>' + message.role + '\\n' }}
  {%- if message.role == 'assistant' %}
    {%- generation %}
    {%- if loop.last %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
    {{- message.content }}
    {%- endgeneration %}
  {%- else %}
    {{- message.content }}
  {%- endif %}
  {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
  {{- '<|im_start|>assistant\\n' }}
  {%- if enable_thinking is defined and enable_thinking is false %}
    {{- '<think>\\n\\n</think>\\n\\n' }}
  {%- endif %}
{%- endif %}
""",
  'gemma': """{{ bos_token }}{% if messages[0]['role'] == 'system' %}\
{{ raise_exception('System role not supported') }}{% endif %}\
{% for message in messages %}\
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate') }}{% endif %}\
{% if message['role'] == 'assistant' %}{% set role = 'model' %}\
{% else %}{% set role = message['role'] %}{% endif %}\
{{ '<start_of_turn>' + role + '
' + message['content'] | trim + '<end_of_turn>
' }}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model
'}}{% endif %}""",
}
_CONFIG = {
  # What pads is what ends.
  'smollm2': {
    'bos_token': '<|im_start|>',
    'eos_token': '<|im_end|>',
    'unk_token': '<|endoftext|>',
    'pad_token': '<|im_end|>',
  },
  'llama3': {'bos_token': '<|begin_of_text|>', 'eos_token': '<|eot_id|>'},
  'qwen3': {
    'bos_token': None,
    'eos_token': {'content': '<|im_end|>', '__type': 'AddedToken'},
    'pad_token': '<|endoftext|>',
  },
  'gemma': {
    'bos_token': '<bos>',
    'eos_token': '<eos>',
    'unk_token': '<unk>',
    'pad_token': '<pad>',
  },
}
_REST = (
  r'[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+'
  r'|\s+(?!\S)|\s+'
)
_WORDS = {
  'llama3': r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|" + _REST % r'\p{N}{1,3}',
  'qwen3': r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|" + _REST % r'\p{N}',
}


@functools.cache
def lines():
  """Returns some 14,000 lines in a dozen languages."""
  found = []
  for code in LANGUAGES:
    locale = babel.Locale.parse(code)
    tables = locale.languages, locale.territories, locale.currencies
    for table in (*tables, locale.scripts):
      found += [f'{key}: {table[key]}' for key in sorted(table)]
  return found


def _bytes(kind):
  """Returns a byte-level BPE tokenizer."""
  tokenizer = tokenizers.Tokenizer(models.BPE())
  if kind == 'smollm2':
    split = pre_tokenizers.Digits(individual_digits=True)
  else:
    split = pre_tokenizers.Split(tokenizers.Regex(_WORDS[kind]), 'isolated')
  if kind == 'qwen3':
    tokenizer.normalizer = normalizers.NFC()
  level = pre_tokenizers.ByteLevel(
    add_prefix_space=False, use_regex=kind == 'smollm2'
  )
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level])
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=VOCABULARY_SIZE - 20,
    special_tokens=[*_IM] if kind == 'smollm2' else [],
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  tokenizer.train_from_iterator(lines()[::3], trainer)
  if kind == 'llama3':
    tokenizer.add_special_tokens([*_LLAMA3])
    begin = _LLAMA3[0]
    tokenizer.post_processor = processors.TemplateProcessing(
      single=f'{begin} $A',
      special_tokens=[(begin, tokenizer.token_to_id(begin))],
    )
  elif kind == 'qwen3':
    tokenizer.add_special_tokens([*_IM])
    tokenizer.add_tokens([*_THINK])
  return tokenizer


def _sentencepiece(path):
  """Writes a SentencePiece model with the options of Gemma's."""
  import sentencepiece

  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(lines()[::3]),
    model_writer=model,
    vocab_size=VOCABULARY_SIZE,
    hard_vocab_limit=False,
    model_type='bpe',
    pad_id=0,
    eos_id=1,
    bos_id=2,
    unk_id=3,
    pad_piece='<pad>',
    eos_piece='<eos>',
    bos_piece='<bos>',
    byte_fallback=True,
    split_digits=True,
    add_dummy_prefix=False,
    remove_extra_whitespaces=False,
    normalization_rule_name='identity',
    character_coverage=0.99,
    user_defined_symbols=[*_TURNS, '\n'],
    minloglevel=2,
  )
  path.write_bytes(model.getvalue())


def make(kind, folder, with_template=True):
  """Writes the files of a tokenizer."""
  config = _CONFIG[kind] | {'clean_up_tokenization_spaces': False}
  if kind == 'gemma':
    config |= {
      'tokenizer_class': 'GemmaTokenizer',
      'additional_special_tokens': [*_TURNS],
    }
    _sentencepiece(folder / 'tokenizer.model')
  else:
    config['tokenizer_class'] = 'PreTrainedTokenizerFast'
    _bytes(kind).save(str(folder / 'tokenizer.json'))
  if with_template and kind == 'llama3':  # Older folders have it here.
    config['chat_template'] = _TEXT[kind]
  elif with_template:
    (folder / 'chat_template.jinja').write_text(_TEXT[kind])
  text = json.dumps({k: v for k, v in config.items() if v is not None})
  (folder / 'tokenizer_config.json').write_text(text)


@pytest.fixture(scope='session')
def tokenizer_folders(tmp_path_factory):
  """Kind -> the folder of its tokenizer; made on first use."""
  root = tmp_path_factory.mktemp('tokenizers')

  @functools.cache
  def folder(kind):
    path = root / kind
    path.mkdir()
    make(kind, path)
    return path

  return folder
