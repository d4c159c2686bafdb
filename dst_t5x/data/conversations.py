"""Conversations: messages of a user and an assistant, and perhaps a system.

    {"messages": [{"role": "user", "content": "…"},
                  {"role": "assistant", "content": "…"}]}

is a row of a `.jsonl` file. All but the last message are what is asked, the
last one, by the assistant, is the answer. Earlier turns of the assistant are
part of the question.

Tasks, INPUT_FILE and servers hand texts on. `to_text` makes one text of a
conversation; a text that is not made by it is one message of the user.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from dst_t5x.core import json_text
from dst_t5x.core.errors import nearest
from dst_t5x.data import text_files

KEY = 'messages'
ROLES = ('system', 'user', 'assistant')
_BEGIN = f'{{"{KEY}": ['

Messages = Sequence[Mapping[str, str]]


def check(value: Any) -> list[dict[str, str]]:
  """Returns messages with their roles and contents.

  Raises:
    MalformedRow: these are no messages.
  """
  if not isinstance(value, list) or not value:
    raise text_files.MalformedRow(f'has {KEY!r} that is no list of messages')
  return [_check_message(i, message) for i, message in enumerate(value)]


def _check_message(number: int, message: Any) -> dict[str, str]:
  where = f'{KEY}[{number}]'
  if not isinstance(message, dict):
    raise text_files.MalformedRow(f'has {where} that is not an object')
  for name in ('role', 'content'):
    if not isinstance(message.get(name), str):
      lack = 'that is not text' if name in message else 'missing'
      raise text_files.MalformedRow(f'has {name!r} of {where} {lack}')
  role = message['role']
  if role not in ROLES:
    raise text_files.MalformedRow(
      f'has role {role!r} in {where}{nearest(role, ROLES)} (known:'
      f' {", ".join(ROLES)})'
    )
  for name, value in message.items():
    # What others write for a message without them.
    if name not in ('role', 'content') and value not in (None, [], {}):
      raise text_files.MalformedRow(
        f'has {name!r} in {where}, which is not supported'
      )
  return {
    'role': role,
    'content': text_files.text_of(message, 'content'),
  }


def to_text(messages: Messages) -> str:
  """Returns the text that stands for a conversation."""
  return json_text.dumps({KEY: list(messages)}, ensure_ascii=False)


def of_text(text: str) -> list[dict[str, str]]:
  """Returns the conversation that a text stands for."""
  if text.startswith(_BEGIN):
    try:
      row = text_files.parse_object(text)
      if row is not None and row.keys() == {KEY}:
        return check(row[KEY])
    except text_files.MalformedRow:
      pass
  return [{'role': 'user', 'content': text}]


def split(value: Any) -> tuple[str, str | None]:
  """Returns what is asked, as a text, and the answer, if there is one.

  Args:
    value: the `messages` of a row.

  Raises:
    MalformedRow: these are no messages, or nothing is asked.
  """
  messages = check(value)
  answer = None
  if messages[-1]['role'] == 'assistant':
    answer = messages.pop()['content']
  if not messages or messages[-1]['role'] != 'user':
    raise text_files.MalformedRow(
      f'has {KEY!r} without a message of the user before the answer'
    )
  return to_text(messages), answer
