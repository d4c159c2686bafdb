"""Rows of messages: what is asked, what is answered, mistakes."""

import json

from fixtures_tokenizers import tokenizer_folders  # noqa: F401
import gin
import pytest
import seqio

from dst_t5x.core.errors import UserError
from dst_t5x.data import conversations
from dst_t5x.data import task_checks
from dst_t5x.data import task_examples
from dst_t5x.data import vocabulary
from dst_t5x.runs import inference
from dst_t5x.tasks import jsonl  # noqa: F401

_LENGTHS = {'inputs': 200, 'targets': 32}
_USER = {'role': 'user', 'content': 'Äpfel?'}
_ANSWER = {'role': 'assistant', 'content': 'Three'}
_SYSTEM = {'role': 'system', 'content': 'Be brief.'}


def _row(*messages, **other):
  return json.dumps({'messages': messages, **other}, ensure_ascii=False)


@pytest.fixture
def use(tmp_path, tokenizer_folders):  # noqa: F811
  """Names a file of lines for the task, and a tokenizer; returns its path."""

  def use(*lines, kind='qwen3', chat_template=True):
    path = tmp_path / 'rows.jsonl'
    path.write_text('\n'.join(lines))
    gin.bind_parameter('jsonl.settings.train_file', str(path))
    folder = str(tokenizer_folders(kind))
    gin.bind_parameter('vocabulary.chosen.name', folder)
    gin.bind_parameter('vocabulary.chosen.chat_template', chat_template)
    return path

  return use


def test_messages_are_trained_on_like_inputs_and_targets(use):
  use(
    json.dumps({'inputs': 'Äpfel?', 'targets': 'Three'}),
    _row(_USER, _ANSWER, id=7),
    _row(_SYSTEM, _USER, _ANSWER, _USER, _ANSWER | {'name': None}),
  )
  task = task_checks.check('jsonl', _LENGTHS, 2)
  dataset = task.get_dataset(None, split='train', shuffle=False)
  one, other, long = dataset.as_numpy_iterator()
  assert one['inputs'].tolist() == other['inputs'].tolist()
  assert one['targets'].tolist() == other['targets'].tolist()
  assert long['targets'].tolist() == one['targets'].tolist()
  chat = vocabulary.chosen()
  text = chat.base.tokenizer.decode(long['inputs'], skip_special_tokens=False)
  # The earlier answer is no target; the task ends its inputs.
  assert text.count('Three') == 1
  assert text.startswith('<|im_start|>system\nBe brief.<|im_end|>\n')
  assert text.endswith('</think>\n\n<|im_end|>')


def test_a_task_is_read_again_with_other_bindings(use):
  """A process may take one run of a sweep after another."""

  def first():
    task = seqio.TaskRegistry.get('jsonl')
    dataset = task_examples.read(task, _LENGTHS, 'train')
    return next(dataset.as_numpy_iterator())['inputs'].tolist()

  row = json.dumps({'inputs': 'Äpfel?', 'targets': 'Three'})
  found = []
  for kind in ('qwen3', 'llama3'):
    for chat_template in (False, True):
      use(row, kind=kind, chat_template=chat_template)
      chosen = vocabulary.chosen()
      found.append(first())
      assert found[-1] == [*chosen.encode('Äpfel?'), chosen.eos_id]
  assert len({*map(tuple, found)}) == 4


def test_a_text_stands_for_a_conversation():
  messages = [_SYSTEM, _USER, _ANSWER, _USER]
  assert conversations.of_text(conversations.to_text(messages)) == messages
  for text in ('Äpfel?', '{"messages": [1]}', '{"messages": []', '{"a": []}'):
    assert conversations.of_text(text) == [{'role': 'user', 'content': text}]


@pytest.mark.parametrize(
  ('line', 'message'),
  [
    (_row(), "has 'messages' that is no list of messages"),
    (json.dumps({'messages': 'x'}), 'that is no list of messages'),
    (_row('x'), r'has messages\[0\] that is not an object'),
    (_row({'role': 'user'}), r"has 'content' of messages\[0\] missing"),
    (_row(_USER, {'role': 'assistant', 'content': [1]}), 'that is not text'),
    (_row({'role': 'usr', 'content': ''}, _ANSWER), "did you mean 'user'"),
    (_row(_USER | {'tool_calls': [1]}, _ANSWER), "'tool_calls' in messages"),
    (_row(_USER, _ANSWER, _USER), 'that do not end with the assistant'),
    (_row(_ANSWER), 'without a message of the user before the answer'),
    (_row(_SYSTEM, _ANSWER), 'without a message of the user'),
  ],
)
def test_malformed_rows_are_named_by_line(use, line, message):
  use(_row(_USER, _ANSWER), line)
  with pytest.raises(UserError, match=message) as caught:
    task_checks.check('jsonl', _LENGTHS, 2)
  assert '1 malformed row: line 2 has' in str(caught.value)
  assert '\n' not in str(caught.value)


def test_what_the_template_refuses_is_named_by_line(use):
  use(_row(_USER, _ANSWER), _row(_SYSTEM, _USER, _ANSWER), kind='gemma')
  with pytest.raises(UserError, match=r'line 2 is no chat: .*not supported'):
    task_checks.check('jsonl', _LENGTHS, 2)


def test_messages_need_a_template(use):
  use(_row(_USER, _ANSWER))
  task_checks.check('jsonl', _LENGTHS, 2)
  gin.bind_parameter('vocabulary.chosen.chat_template', False)
  with pytest.raises(UserError, match=r'line 1 has .*set CHAT_TEMPLATE = T'):
    task_checks.check('jsonl', _LENGTHS, 2)


def test_input_files_have_the_prompts_of_tasks(use):
  path = use(_row(_SYSTEM, _USER), _row(_USER, _ANSWER))
  feature = seqio.TaskRegistry.get('jsonl').output_features['inputs']
  asked, answered = inference._of_file(str(path), feature, _LENGTHS)
  chat = vocabulary.chosen()
  text = conversations.to_text([_SYSTEM, _USER])
  assert asked == {
    'inputs': text,
    'tokens': [*chat.encode(text), chat.eos_id],
  }
  assert answered['targets'] == 'Three'
  assert answered['tokens'] == [*chat.encode('Äpfel?'), chat.eos_id]


def test_rows_that_will_be_cut_are_told(use, caplog):
  use(_row(_USER, _ANSWER), _row(_USER | {'content': 'x y ' * 99}, _ANSWER))
  task_checks.check('jsonl', _LENGTHS, 2)
  (line,) = (r.getMessage() for r in caplog.records if 'cuts' in r.getMessage())
  assert 'cuts the end of the inputs of 1 of the first 2 examples' in line
