"""Chat templates of Hugging Face: how a conversation becomes one text.

The template is `chat_template.jinja` beside the tokenizer, or `chat_template`
of `tokenizer_config.json`. It is rendered in Jinja's sandbox with the filters,
functions and variables that transformers gives it, except for two:

-   A template that asks for today's date gets 26 Jul 2024, the default of
    Llama's template: a run must be the same on any day.
-   A template that can ask for thoughts gets `enable_thinking = False`, because
    the targets of tasks have none.
"""

from collections.abc import Mapping
import datetime
import json
from typing import Any

from etils import epath
import jinja2
from jinja2 import ext
from jinja2 import nodes
from jinja2 import sandbox
from jinja2 import utils

from dst_t5x.core import json_object
from dst_t5x.core import object_stores
from dst_t5x.core.errors import UserError, first_line
from dst_t5x.data import conversations

FILE = 'chat_template.jinja'
_CONFIG = 'tokenizer_config.json'
_KEY = 'chat_template'
_TODAY = datetime.datetime(2024, 7, 26)


class ChatTemplate:
  """Makes a text of messages.

  Attributes:
    where: the file, for messages.
  """

  def __init__(
    self, source: str, where: str, special_tokens: Mapping[str, str]
  ) -> None:
    """Compiles a template.

    Args:
      source: the template.
      where: its file, for messages.
      special_tokens: name -> text, such as `bos_token` -> `<s>`.

    Raises:
      UserError: this is no template.
    """
    self.where = where
    self._special_tokens = dict(special_tokens)
    try:
      self._template = _environment().from_string(source)
    except jinja2.TemplateError as e:
      raise UserError(f'{where} is no chat template: {first_line(e)}') from e

  def render(self, messages: conversations.Messages, asks: bool) -> str:
    """Returns the text of a conversation.

    Args:
      messages: the conversation.
      asks: whether the text ends where the assistant's answer begins.

    Raises:
      UserError: the template refuses the messages.
    """
    try:
      return self._template.render(
        messages=[dict(message) for message in messages],
        tools=None,
        documents=None,
        add_generation_prompt=asks,
        enable_thinking=False,
        **self._special_tokens,
      )
    except Exception as e:  # A template may do whatever raises anything.
      raise UserError(
        f'{self.where} refuses the messages: {first_line(e)}'
      ) from e


def read(folder: epath.Path, special_tokens: Mapping[str, str]) -> ChatTemplate:
  """Returns the template in a tokenizer's folder.

  Args:
    folder: the folder.
    special_tokens: see `ChatTemplate`.

  Raises:
    UserError: there is none, or it is damaged.
  """
  file = folder / FILE
  with object_stores.explained(file, f'cannot read {file}: '):
    if file.exists():
      text = object_stores.read_bytes(file).decode('utf-8', 'replace')
      return ChatTemplate(text, str(file), special_tokens)
    has_config = (folder / _CONFIG).exists()
  if has_config:
    stated = json_object.read(folder / _CONFIG)
    source = stated.content.get(_KEY)
    # Older files have several, by name.
    if isinstance(source, list):
      named = [t for t in source if isinstance(t, dict)]
      source = {t.get('name'): t.get('template') for t in named}.get('default')
    if isinstance(source, str):
      where = f'{_KEY} in {stated.where}'
      return ChatTemplate(source, where, special_tokens)
  raise UserError(
    f'{folder} has no chat template, neither {FILE} nor {_KEY} in {_CONFIG}:'
    ' set CHAT_TEMPLATE = False, or VOCABULARY to the folder of a tuned model'
  )


class _Generation(ext.Extension):
  """`{% generation %}`, around what the assistant writes: has no effect."""

  tags = {'generation'}  # noqa: RUF012

  def parse(self, parser: Any) -> nodes.Node:
    line = next(parser.stream).lineno
    body = parser.parse_statements(('name:endgeneration',), drop_needle=True)
    return nodes.Scope(body, lineno=line)


class _Namespace(utils.Namespace):
  """A template's own variables; a name with an underscore leads to Python's."""

  def __init__(*args: Any, **kwargs: Any) -> None:
    self, *more = args
    attributes = dict(*more, **kwargs)
    for name in attributes:
      _check_name(name)
    utils.Namespace.__init__(self, attributes)

  def __setitem__(self, name: str, value: Any) -> None:
    _check_name(name)
    super().__setitem__(name, value)


def _check_name(name: Any) -> None:
  if str(name).startswith('_'):
    raise jinja2.exceptions.SecurityError(f'{name!r} begins with an underscore')


def _environment() -> jinja2.Environment:
  """Returns transformers' own environment of chat templates."""
  environment = sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=[_Generation, ext.loopcontrols],
  )

  def refuse(message: str) -> None:
    raise jinja2.TemplateError(message)

  def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Any = None,
    sort_keys: bool = False,
  ) -> str:
    return json.dumps(
      value,
      allow_nan=False,
      ensure_ascii=ensure_ascii,
      indent=indent,
      separators=separators,
      sort_keys=sort_keys,
    )

  environment.filters['tojson'] = to_json  # Jinja's own escapes HTML.
  environment.globals |= {
    'raise_exception': refuse,
    'strftime_now': _TODAY.strftime,
    'namespace': _Namespace,
  }
  return environment
