"""Hugging Face's tokenizers as vocabularies, against transformers."""

import json

import pytest
import seqio
import tensorflow as tf
import tokenizers
from tokenizers import decoders
from tokenizers import models
from tokenizers import normalizers
from tokenizers import pre_tokenizers
from tokenizers import processors
from tokenizers import trainers

from dst_t5x.core.errors import UserError
from dst_t5x.data import task_vocabulary
from dst_t5x.data import vocabulary

transformers = pytest.importorskip('transformers')

TEXTS = [
  'The quick brown fox jumps over the lazy dog.',
  'Der schnelle Fuchs fährt über die Straße; «Größe» zählt.',
  'Le garçon mangea une pêche à Noël.',
  'Быстрая лиса прыгает через собаку.',
  '素早い茶色の狐が怠け者の犬を飛び越える。',
  'الثعلب البني السريع',
  'नमस्ते दुनिया',
  'price: $3.50 (50 % off)\n\n\ttab  two  spaces   three',
  'emoji 👩‍👩‍👧 and ﬁ ligature, e\u0301',
  '12345 67 890',
  ' leading and trailing ',
  '',
]
_SPECIAL = {
  # SmolLM2: what begins and what ends is one token, id 0, and is not put before
  # texts. Llama 3: it is put there, and its ids are above all others. Gemma: a
  # padding token of its own, id 0.
  'smollm2': ['<|endoftext|>', '<|im_start|>', '<|im_end|>'],
  'llama3': ['<|begin_of_text|>', '<|end_of_text|>', '<|eot_id|>'],
  'gemma': ['<pad>', '<eos>', '<bos>', '<unk>'],
}
_BEGIN_AND_END = {
  'smollm2': ('<|endoftext|>', '<|endoftext|>'),
  'llama3': ('<|begin_of_text|>', '<|end_of_text|>'),
  'gemma': ('<bos>', '<eos>'),
}
_DIGITS = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|\s+"


def _bytes(kind):
  """Returns byte-level BPE as SmolLM2 or Llama 3 have it."""
  tokenizer = tokenizers.Tokenizer(models.BPE())
  split = (
    pre_tokenizers.Digits(individual_digits=True)
    if kind == 'smollm2'
    else pre_tokenizers.Split(tokenizers.Regex(_DIGITS), 'isolated')
  )
  level = pre_tokenizers.ByteLevel(
    add_prefix_space=False, use_regex=kind == 'smollm2'
  )
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level])
  tokenizer.decoder = decoders.ByteLevel()
  special = _SPECIAL[kind] if kind == 'smollm2' else []
  trainer = trainers.BpeTrainer(
    vocab_size=500,
    special_tokens=special,
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  return tokenizer, trainer


def _pieces():
  """Returns BPE with bytes for what is unknown, as Gemma has it."""
  tokenizer = tokenizers.Tokenizer(
    models.BPE(unk_token='<unk>', byte_fallback=True)
  )
  tokenizer.normalizer = normalizers.Replace(' ', '▁')
  tokenizer.decoder = decoders.Sequence(
    [
      decoders.Replace('▁', ' '),
      decoders.ByteFallback(),
      decoders.Fuse(),
    ]
  )
  fallback = [f'<0x{i:02X}>' for i in range(256)]
  trainer = trainers.BpeTrainer(
    vocab_size=500,
    special_tokens=[*_SPECIAL['gemma'], *fallback],
    show_progress=False,
  )
  return tokenizer, trainer


@pytest.fixture(scope='module', params=_SPECIAL)
def folder(request, tmp_path_factory):
  """A folder of a tokenizer as one of the families has it."""
  kind = request.param
  tokenizer, trainer = _pieces() if kind == 'gemma' else _bytes(kind)
  tokenizer.train_from_iterator(TEXTS[:6] * 3, trainer)
  begin, end = _BEGIN_AND_END[kind]
  if kind == 'llama3':
    tokenizer.add_special_tokens(_SPECIAL[kind])
  if kind != 'smollm2':
    tokenizer.post_processor = processors.TemplateProcessing(
      single=f'{begin} $A',
      special_tokens=[(begin, tokenizer.token_to_id(begin))],
    )
  path = tmp_path_factory.mktemp('tokenizer') / kind / 'model'
  path.mkdir(parents=True)
  tokenizer.save(str(path / 'tokenizer.json'))
  config = {
    'bos_token': begin,
    'eos_token': {'content': end, 'lstrip': False, '__type': 'AddedToken'},
    'tokenizer_class': 'PreTrainedTokenizerFast',
    'clean_up_tokenization_spaces': False,
  }
  (path / 'tokenizer_config.json').write_text(json.dumps(config))
  return path


def _kind(folder):
  return folder.parent.name


@pytest.fixture(scope='module')
def lines(request):
  """Real lines, German, English and mathematics, where they are."""
  try:
    data = request.getfixturevalue('shared_data')
  except pytest.skip.Exception:
    return []
  found = []
  for file in sorted((data / 'wmt').rglob('*.*'))[:4]:
    found += file.read_text(encoding='utf-8').splitlines()[:1000]
  for file in sorted((data / 'gsm8k').glob('*.jsonl'))[:1]:
    found += file.read_text(encoding='utf-8').splitlines()[:1000]
  return found


def test_tokens_and_texts_are_those_of_transformers(folder, lines):
  ours = vocabulary._make(str(folder))
  theirs = transformers.AutoTokenizer.from_pretrained(folder)
  for text in [*TEXTS, *_SPECIAL[_kind(folder)], *lines]:
    ids = list(ours.encode(text))
    assert ids == theirs.encode(text, add_special_tokens=False), text
    decoded = theirs.decode(ids, skip_special_tokens=True)
    assert ours.decode(ids) == decoded, text


def test_special_tokens_are_those_of_transformers(folder):
  ours = vocabulary._make(str(folder))
  theirs = transformers.AutoTokenizer.from_pretrained(folder)
  assert ours.eos_id == theirs.eos_token_id
  assert ours.bos_id == theirs.bos_token_id
  assert ours.vocab_size == len(theirs)
  begin = theirs.encode('x')[0]
  is_put = begin == theirs.bos_token_id
  assert ours.begin_id == (begin if is_put else None)
  kind = _kind(folder)
  assert is_put == (kind != 'smollm2')
  assert (ours.eos_id == ours.bos_id == 0) == (kind == 'smollm2')


def test_what_is_behind_the_end_is_cut(folder):
  ours = vocabulary._make(str(folder))
  ids = [*ours.encode('The fox'), ours.eos_id]
  for filler in (0, ours.encode('lazy')[0]):
    padded = [*ids, filler, filler]
    assert ours.decode(padded) == 'The fox'
    assert ours.decode_tf(tf.constant(padded)).numpy() == b'The fox'


def test_token_0_is_no_padding(folder):
  """It is a piece of text, the end, or a token of its own."""
  ours = vocabulary._make(str(folder))
  text = ours.decode([*ours.encode('x'), 0, *ours.encode('y')])
  first = ours.tokenizer.id_to_token(0)
  expected = {'smollm2': 'x', 'llama3': f'x{first}y', 'gemma': 'xy'}
  assert text == expected[_kind(folder)]


def test_tensors_of_texts(folder):
  ours = vocabulary._make(str(folder))
  expected = [list(ours.encode(text)) for text in TEXTS]
  dataset = tf.data.Dataset.from_tensor_slices(TEXTS).map(ours.encode_tf)
  assert dataset.element_spec == tf.TensorSpec([None], tf.int32)
  found = [ids.tolist() for ids in dataset.as_numpy_iterator()]
  assert found == expected
  ragged = ours.encode_tf(tf.constant(TEXTS))
  assert ragged.to_list() == expected
  texts = [text.decode() for text in ours.decode_tf(ragged).numpy()]
  assert texts == [ours.decode(ids) for ids in expected]


def test_it_is_chosen_by_its_folder_or_its_file(folder):
  one, other = (
    vocabulary.chosen(str(path)) for path in (folder, folder / 'tokenizer.json')
  )
  assert one == other
  task_vocabulary.check(one)
  assert one != vocabulary.chosen('bytes')


def _features(path):
  return {'targets': seqio.Feature(vocabulary._make(str(path)))}


def test_the_model_begins_and_ends_texts_as_the_vocabulary_does(folder):
  features = _features(folder)
  ours = features['targets'].vocabulary
  task_vocabulary.check_special(features, ours.eos_id, ours.begin_id)
  with pytest.raises(UserError, match=f'set EOS_ID = {ours.eos_id},'):
    task_vocabulary.check_special(features, 9, ours.begin_id)
  with pytest.raises(UserError, match=f'set BEGIN_ID = {ours.begin_id},'):
    task_vocabulary.check_special(features, ours.eos_id, 9)


def test_a_gemma_does_not_take_the_vocabulary_of_t5():
  """Its end token is 1, too."""
  task_vocabulary.check_special(_features('bytes'), 1, None)
  with pytest.raises(UserError, match=r'tokenizer\.json'):
    task_vocabulary.check_special(_features('bytes'), 1, 2)


@pytest.mark.parametrize(
  ('files', 'message'),
  [
    ({}, r'tokenizer\.json'),
    ({'tokenizer.json': '{}'}, r'tokenizer\.json is no tokenizer'),
    ({'tokenizer_config.json': '{}'}, 'states no eos_token'),
    (
      {'tokenizer_config.json': '{"eos_token": "<none>"}'},
      'eos_token must be a token of tokenizer.json',
    ),
    ({'tokenizer_config.json': None}, r'tokenizer_config\.json'),
  ],
)
def test_what_is_missing_or_damaged_is_named(folder, tmp_path, files, message):
  if files:
    for name in ('tokenizer.json', 'tokenizer_config.json'):
      (tmp_path / name).write_text((folder / name).read_text())
  for name, content in files.items():
    (tmp_path / name).unlink()
    if content is not None:
      (tmp_path / name).write_text(content)
  with pytest.raises(UserError, match=message) as caught:
    task_vocabulary.check(vocabulary._make(str(tmp_path)))
  assert '\n' not in str(caught.value)
