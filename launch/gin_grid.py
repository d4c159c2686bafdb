"""Sweep files in gin, equivalent to those in YAML (`launch/grid.py`).

    model = 'small'
    task = ['gsm8k', 'wmt22_de_en']
    TRAIN_STEPS = 1000
    INITIAL_CHECKPOINT_PATH = 'gs://bucket/t5_1_1_{model}'

    dst/method = 'dst'
    dst/EPSILON = [1e-6, 1e-4]
    dst/LEARNING_RATE = [0.1, 0.3]

    full/method = 'full'

A list is an axis of the grid. A scope is a grid that inherits the settings
without a scope or with a shorter one. The name of a scope has no meaning. A
value that is itself a list is written as a tuple or within another list:
`METRICS = [['bleu', 'chrf']]`.
"""

from collections.abc import Container
from typing import Any

from gin import config_parser

from dst_t5x.config import gin_files
from dst_t5x.core.errors import UserError


class _Text(str):
  """A text that gin reads without quotes."""

  def __repr__(self) -> str:
    return str(self)


class _AsWritten(config_parser.ParserDelegate):
  """A delegate of gin's parser that accepts all names; training checks them."""

  def configurable_reference(self, scoped_name: str, evaluate: bool) -> _Text:
    """Returns `@name` or `@name()`."""
    return _Text(f'@{scoped_name}{"()" if evaluate else ""}')

  def macro(self, macro_name: str) -> _Text:
    """Returns `%NAME`."""
    return _Text(f'%{macro_name}')


class _Parser(config_parser.ConfigParser):
  """Gin's parser, which keeps the spelling of numbers, for names of runs."""

  def __init__(self, text: str) -> None:
    super().__init__(text, _AsWritten())

  def parse_value(self) -> Any:
    """Returns a value; numbers are texts."""
    written = self.current_token.string
    value = super().parse_value()
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return _Text(written) if is_number and written != '-' else value


def read(
  text: str, name: str, grids: str, kinds: Container[str]
) -> dict[str, Any]:
  """Returns the content of a file in the form of a YAML file's.

  Args:
    text: the content.
    name: the file's name, for messages.
    grids: the key of the grids within a grid.
    kinds: the keys that choose gin files.

  Raises:
    UserError: gin cannot read the file, or a name appears twice.
  """
  nodes: dict[tuple[str, ...], dict[str, Any]] = {(): {}}

  def node_of(scopes: tuple[str, ...]) -> dict[str, Any]:
    if scopes not in nodes:
      nodes[scopes] = {}
      node_of(scopes[:-1]).setdefault(grids, []).append(nodes[scopes])
    return nodes[scopes]

  for statement, place in gin_files.statements(text, name, _Parser):
    if isinstance(statement, config_parser.BlockDeclaration):
      continue  # The bindings of the scope follow.
    if not isinstance(statement, config_parser.BindingStatement):
      raise UserError(f'{place}: a sweep includes and imports nothing')
    key = '.'.join(filter(None, (statement.selector, statement.arg_name)))
    if key == grids:
      raise UserError(f'{place}: write a grid as a scope, `NAME/EPSILON = …`')
    node = node_of(tuple(filter(None, statement.scope.split('/'))))
    if key in node:
      raise UserError(f'{place}: {key} is there twice')
    value = statement.value
    node[key] = (
      [_text(item, key in kinds) for item in value]
      if isinstance(value, list)
      else _text(value, key in kinds)
    )
  return nodes[()]


def _text(value: Any, is_file: bool) -> str:
  """Returns a value as in YAML, without quotes that gin does not need.

  Args:
    value: the parsed value.
    is_file: whether the value chooses a gin file.
  """
  if isinstance(value, str) and (is_file or _is_bare(value)):
    return str(value)
  return repr(value)


def _is_bare(value: str) -> bool:
  """Returns whether training's command line takes a word for a text."""
  try:
    return gin_files.literal('', value) == repr(value)
  except UserError:
    return False
