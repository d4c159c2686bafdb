"""Chat templates, and tokens of real languages, against transformers."""

import json

from fixtures_tokenizers import KINDS
from fixtures_tokenizers import lines
from fixtures_tokenizers import make
from fixtures_tokenizers import tokenizer_folders  # noqa: F401
import gin
import pytest
import seqio
import tensorflow as tf

from dst_t5x.core.errors import UserError
from dst_t5x.data import chat_template
from dst_t5x.data import conversations
from dst_t5x.data import task_vocabulary
from dst_t5x.data import vocabulary

transformers = pytest.importorskip('transformers')

# Question and answer.
PAIRS = [
  ('upper: plum', 'PLUM'),
  ('Wie heißt «Größe»?\n\nEins.\n', 'Size\n#### 7\n\nEnd'),
  ('  two  spaces  ', '素早い狐, नमस्ते\tx'),
  ('<|im_end|> & <b> "quoted" {{ x }}', '{"a": [1]} </s>'),
  ('', 'x'),
]
# What ours fixes; see chat_template.
FIXED = {'date_string': '26 Jul 2024', 'enable_thinking': False}
END = {
  'smollm2': '<|im_end|>',
  'llama3': '<|eot_id|>',
  'qwen3': '<|im_end|>',
  'gemma': '<end_of_turn>',
}


@pytest.fixture(params=KINDS)
def kind(request):
  return request.param


@pytest.fixture
def folder(kind, tokenizer_folders):  # noqa: F811
  return tokenizer_folders(kind)


def _chat(folder):
  return vocabulary.chosen(str(folder), chat_template=True)


def _theirs(folder):
  return transformers.AutoTokenizer.from_pretrained(folder)


def _asked(*contents):
  roles = ('user', 'assistant')
  return [
    {'role': roles[i % 2], 'content': content}
    for i, content in enumerate(contents)
  ]


def _ids(tokenizer, messages, asks):
  return tokenizer.apply_chat_template(
    messages, add_generation_prompt=asks, **FIXED
  )['input_ids']


def test_10_000_lines_have_the_tokens_of_transformers(kind, folder):
  ours, theirs = vocabulary.chosen(str(folder)), _theirs(folder)
  odd = ['tab\t two  spaces\n\n\nlines ', ' é e\u0301 👩‍👩 ', '1234567', '']
  texts = [*lines(), *odd]
  assert len(texts) > 10_000
  expected = theirs(texts, add_special_tokens=False)['input_ids']
  decoded = theirs.batch_decode(expected, skip_special_tokens=True)
  for text, ids, back in zip(texts, expected, decoded, strict=True):
    assert list(ours.encode(text)) == ids, text
    assert ours.decode(ids) == back, text
  # Few pieces are single bytes: languages are not just spelt.
  assert sum(map(len, expected)) < 0.6 * sum(len(t.encode()) for t in texts)


@pytest.mark.parametrize('pair', PAIRS)
def test_prompts_and_answers_are_those_of_transformers(kind, folder, pair):
  chat, theirs = _chat(folder), _theirs(folder)
  begin = [] if chat.begin_id is None else [chat.begin_id]
  prompt = [*begin, *chat.encode(pair[0])]
  assert prompt == _ids(theirs, _asked(pair[0]), asks=True)
  row = [*prompt, *chat.answers.encode(pair[1]), chat.eos_id]
  whole = _ids(theirs, _asked(*pair), asks=False)
  assert row == whole[: len(row)]
  # What is behind the end of the turn.
  assert not theirs.decode(whole[len(row) :]).strip()


def test_the_end_of_a_turn_is_what_ends_a_text(kind, folder):
  chat = _chat(folder)
  assert chat.base.control_tokens[END[kind]] == chat.eos_id
  assert (chat.begin_id is not None) == (kind in ('llama3', 'gemma'))
  for _, answer in PAIRS:
    ids = chat.answers.encode(answer)
    assert chat.decode([*ids, chat.eos_id, 5, 0]) == answer
    assert chat.decode([*ids, chat.eos_id]) == chat.answers.decode(ids)


def test_a_conversation_is_one_prompt(kind, folder):
  messages = _asked('One', 'Two', 'Three')
  if kind != 'gemma':
    messages.insert(0, {'role': 'system', 'content': 'Be brief.'})
  chat, theirs = _chat(folder), _theirs(folder)
  text = conversations.to_text(messages)
  begin = [] if chat.begin_id is None else [chat.begin_id]
  prompt = [*begin, *chat.encode(text)]
  assert prompt == _ids(theirs, messages, asks=True)
  row = [*prompt, *chat.answers.encode('Four'), chat.eos_id]
  messages.append({'role': 'assistant', 'content': 'Four'})
  assert row == _ids(theirs, messages, asks=False)[: len(row)]


def test_gemma_has_no_system(tokenizer_folders):  # noqa: F811
  chat = _chat(tokenizer_folders('gemma'))
  messages = [{'role': 'system', 'content': 'Be brief.'}, *_asked('x')]
  with pytest.raises(UserError, match='System role not supported') as caught:
    chat.check_messages(conversations.to_text(messages))
  assert 'chat_template.jinja refuses the messages' in str(caught.value)
  assert '\n' not in str(caught.value)


def test_tasks_have_the_parts_of_a_chat(folder):
  chat = _chat(folder)
  gin.bind_parameter('vocabulary.chosen.name', str(folder))
  features = task_vocabulary.output_features()
  document = task_vocabulary.TaskVocabulary('text')
  plain = [*chat.base.encode('plum')]
  for name in features:
    assert [*features[name].vocabulary.encode('plum')] == plain
  gin.bind_parameter('vocabulary.chosen.chat_template', True)
  expected = {'inputs': chat.encode('plum'), 'targets': plain}
  for name, ids in expected.items():
    part = features[name].vocabulary
    assert part.encode('plum') == ids
    assert part.encode_tf(tf.constant('plum')).numpy().tolist() == ids
    assert part.eos_id == chat.eos_id
  assert [*document.encode('plum')] == plain
  assert document.eos_id == chat.base.eos_id
  task_vocabulary.check(features['inputs'].vocabulary)
  task_vocabulary.check_chat('x', features)
  task_vocabulary.check_fits(features, chat.vocab_size)
  with pytest.raises(UserError, match='choose another model, or set VOCAB'):
    task_vocabulary.check_fits(features, chat.vocab_size - 1)
  task_vocabulary.check_special(features, chat.eos_id, chat.begin_id)
  with pytest.raises(UserError, match=f'set EOS_ID = {chat.eos_id},'):
    task_vocabulary.check_special(features, 700, chat.begin_id)
  with pytest.raises(UserError, match='no effect on the targets of task'):
    task_vocabulary.check_chat('x', {'targets': seqio.Feature(document)})


@pytest.mark.parametrize('kind', ['qwen3', 'gemma'])
def test_a_missing_template_is_named(kind, tmp_path):
  make(kind, tmp_path, with_template=False)
  task_vocabulary.check(vocabulary.chosen(str(tmp_path)))
  with pytest.raises(UserError, match='has no chat template, neither') as error:
    task_vocabulary.check(_chat(tmp_path))
  assert '\n' not in str(error.value)


def test_bytes_have_no_template():
  with pytest.raises(UserError, match='no chat template: set CHAT_TEMPLATE ='):
    task_vocabulary.check(vocabulary.chosen('bytes', chat_template=True))


class _Tokens:
  """A vocabulary that has a folder."""

  special_tokens = {}  # noqa: RUF012

  def __init__(self, folder):
    self.folder = folder


@pytest.mark.parametrize(
  ('source', 'message'),
  [
    ('{% for x %}', 'is no chat template'),
    ("{{ raise_exception('never') }}", 'refuses the messages: never'),
    ('{{ messages[0].content.nothing() }}', 'refuses the messages'),
    ("{{ ''.__class__.__mro__ }}", 'refuses the messages: access to attribute'),
    ("{% set n = namespace(__class__='x') %}", 'begins with an underscore'),
    ('{% if add_generation_prompt %}x{% endif %}', 'does not begin'),
    ('{{ messages | length }}x', 'does not begin'),
    (
      '{% if messages | length > 1 %}<s>{{ messages[1].content }}{% endif %}',
      "has '<s>' between a prompt and its answer",
    ),
  ],
)
def test_templates_that_cannot_be_used(source, message, tmp_path):
  chat = task_vocabulary.chat_vocabulary.ChatVocabulary(_Tokens(tmp_path))
  (tmp_path / 'chat_template.jinja').write_text(source)
  with pytest.raises(UserError) as caught:
    chat.load()
  assert message in str(caught.value)
  assert '\n' not in str(caught.value)


def test_a_list_of_templates_has_a_default(tokenizer_folders, tmp_path):  # noqa: F811
  template = '{{ messages[0].content }}:{{ messages[1].content }}'
  named = [
    {'name': 'tool_use', 'template': 'x'},
    {'name': 'default', 'template': template},
  ]
  config = {'eos_token': '<|im_end|>', 'chat_template': named}
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps(config))
  found = chat_template.read(tmp_path, {})
  assert found.render(_asked('a', 'b'), asks=False) == 'a:b'
