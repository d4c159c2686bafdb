"""Gin files: where they are, and the place of every binding in them.

Gin remembers neither the file nor the line of a binding. This reader calls
gin's own parser for each statement. It remembers the place, and turns errors
into one line that begins with the place.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import enum
import pathlib
import re
import tokenize
from typing import Any, NamedTuple

from etils import epath
from gin import config as gin_config
from gin import config_parser

from dst_t5x.config import gin_names
from dst_t5x.core import values
from dst_t5x.core.errors import UserError, nearest

_PACKAGE = pathlib.Path(__file__).parent.parent
# Exceptions that gin raises for an invalid configuration.
_MISTAKES = (UserError, KeyError, NameError, TypeError, ValueError)


class Key(NamedTuple):
  """The parameter that a binding sets, with its full selector.

  Macros are bindings of `gin.macro.value`, in a scope of the macro's name.
  """

  scope: str
  selector: str
  parameter: str

  @property
  def is_macro(self) -> bool:
    """Whether the scope is the name of a macro."""
    return self.selector == 'gin.macro'


class Author(enum.Enum):
  """Who wrote a binding."""

  PACKAGE = enum.auto()
  USER_FILE = enum.auto()
  COMMAND_LINE = enum.auto()


@dataclasses.dataclass(frozen=True)
class Origin:
  """The origin of a binding: `place` is `file:line` or the flag."""

  author: Author
  place: str


Origins = dict[Key, Origin]


def shipped() -> list[str]:
  """Returns the names of the package's gin files: `gin/….gin`."""
  files = (_PACKAGE / 'gin').glob('**/*.gin')
  return sorted(path.relative_to(_PACKAGE).as_posix() for path in files)


def find(name: str) -> epath.Path:
  """Returns a file as given, or the package's file of that name.

  Raises:
    UserError: neither exists.
  """
  for path in (epath.Path(name).expanduser(), epath.Path(_PACKAGE / name)):
    if path.is_file():
      return path
  raise UserError(f'there is no gin file {name!r}{nearest(name, shipped())}')


def macro_lines(name: str) -> list[str]:
  """Returns the lines of a gin file that define macros; imports nothing."""
  statements = config_parser.ConfigParser(find(name).read_text(), _Syntax())
  return [
    statement.location.line_content.strip()
    for statement in statements
    if isinstance(statement, config_parser.BindingStatement)
    and not statement.arg_name
  ]


def shipped_macros() -> set[str]:
  """Returns the names of the macros that the package's gin files define."""
  lines = (line for name in shipped() for line in macro_lines(name))
  return {line.partition('=')[0].strip() for line in lines}


def literals(name: str) -> dict[str, Any]:
  """Returns what a gin file binds to literals, imports nothing.

  Args:
    name: a path, or the name of a file of the package.

  Returns:
    Macro, or `module.function.parameter` as the file has it, -> value; later
    lines and included files replace earlier ones. What refers to something has
    None in place of it.

  Raises:
    UserError: the file, or one that it includes, does not exist or makes no
      sense.
  """
  found: dict[str, Any] = {}
  text = find(name).read_text()
  for statement, _ in statements(text, name, _without_looking):
    if isinstance(statement, config_parser.IncludeStatement):
      found |= literals(statement.filename)
    elif isinstance(statement, config_parser.BindingStatement):
      parts = (statement.selector, statement.arg_name)
      found['.'.join(filter(None, parts))] = statement.value
  return found


def literals_of_flags(flags: Mapping[str, str]) -> dict[str, Any]:
  """Returns the same of `--gin.NAME=VALUE`: name -> value."""
  found = {}
  for name, value in flags.items():
    flag = f'--gin.{name}'
    text = f'x = {literal(flag, value)}'
    for statement, _ in statements(text, flag, _without_looking):
      found[name] = statement.value
  return found


def _without_looking(text: str) -> config_parser.ConfigParser:
  """Returns a parser that looks nothing up."""
  return config_parser.ConfigParser(text, _Syntax())


def read_file(
  name: str, origins: Origins, including: tuple[str, ...] = ()
) -> None:
  """Reads a gin file and the files that it includes into gin's configuration.

  Args:
    name: a path, or the name of a file of the package.
    origins: the origin of each binding; this function adds to it.
    including: the files whose include statements led to this one.

  Raises:
    UserError: the file, or something that it names, does not exist or is
      invalid.
  """
  if name in including:
    raise UserError(f'{including[-1]} includes {name}, which includes it')
  path = find(name)
  try:
    text = path.read_text()
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f'gin file {name!r} cannot be read: {error}') from None
  shipped_files = pathlib.Path(_PACKAGE / 'gin').resolve()
  is_shipped = shipped_files in pathlib.Path(path).resolve().parents
  author = Author.PACKAGE if is_shipped else Author.USER_FILE
  with gin_names.names(gin_names.FileNames()) as known:
    for statement, place in statements(text, name):
      with _located(place):
        if isinstance(statement, config_parser.IncludeStatement):
          find(statement.filename)
        else:
          _carry_out(statement, known, Origin(author, place), origins)
          continue
      read_file(statement.filename, origins, (*including, name))
  gin_config._IMPORTS.update(known.imports)


def read_flags(
  flags: Sequence[tuple[str, str]], origins: Origins, binary: Any = None
) -> None:
  """Reads each `--gin.NAME=VALUE` into gin's configuration.

  Args:
    flags: (name, value). A name is a macro or `scope/module.Class.parameter`;
      scope and module are optional. A value is a literal of gin. A bare word or
      a path is a text.
    origins: the origin of each binding; this function adds to it.
    binary: gin's reference to the function that will be called, if known.

  Raises:
    UserError: a name is unknown or a value is invalid.
  """
  parsed = []
  # Values come first: a flag may set a parameter of what a later flag names.
  for name, value in flags:
    flag = f'--gin.{name}'
    text = f'{name} = {literal(flag, value)}'
    with gin_names.names(gin_names.FlagNames(binary)):
      parsed.append((flag, list(statements(text, flag))))
  for flag, of_flag in parsed:
    with gin_names.names(gin_names.FlagNames(binary)) as known, _located(flag):
      for statement, _ in of_flag:
        origin = Origin(Author.COMMAND_LINE, flag)
        _carry_out(statement, known, origin, origins)


def _carry_out(
  statement: Any, known: gin_names.FileNames, origin: Origin, origins: Origins
) -> None:
  """Executes a binding or an import; stores the origin of a binding."""
  if isinstance(statement, config_parser.ImportStatement):
    known.process_import(statement)
  elif isinstance(statement, config_parser.BlockDeclaration):
    known.get_configurable(statement.selector)
  else:
    scope, selector, parameter, value, _ = statement
    if not parameter:
      scope = f'{scope}/{selector}' if scope else selector
      selector, parameter = 'gin.macro', 'value'
    configurable = known.get_configurable(selector)
    gin_names.check_parameter(configurable, selector, parameter)
    gin_config.bind_parameter((scope, selector, parameter), value)
    origins[Key(scope, configurable.selector, parameter)] = origin


class _Syntax(config_parser.ParserDelegate):
  """A delegate of gin's parser that accepts all names."""

  def configurable_reference(self, scoped_name: str, evaluate: bool) -> None:
    """Accepts any `@name`."""

  def macro(self, macro_name: str) -> None:
    """Accepts any `%NAME`."""


@contextlib.contextmanager
def _located(place: str) -> Iterator[None]:
  """Turns gin's errors into a UserError of one line with the place."""
  try:
    yield
  except _MISTAKES as error:
    # Gin appends lines to messages, and KeyError puts quotes around its own.
    message = error.args[0] if type(error) is KeyError else error
    raise UserError(f'{place}: {str(message).splitlines()[0]}') from None


def _parser(text: str) -> config_parser.ConfigParser:
  return config_parser.ConfigParser(text, gin_config.ParserDelegate())


def statements(
  text: str,
  name: str,
  make_parser: Callable[[str], config_parser.ConfigParser] = _parser,
) -> Iterator[tuple[Any, str]]:
  """Yields gin's statements with `name:line`; for a flag, with its name.

  Args:
    text: the content of a file or a flag.
    name: the name of the file or the flag.
    make_parser: makes the parser; by default, all names must be known.

  Raises:
    UserError: gin cannot parse the text.
  """

  def place(line: int | None) -> str:
    return name if name.startswith('--') else f'{name}:{line}'

  parser = None
  while True:
    try:
      if parser is None:  # The constructor already reads a token.
        parser = make_parser(text)
      statement = parser.parse_statement()
    except SyntaxError as error:
      raise UserError(f'{place(error.lineno)}: {_explained(error)}') from None
    except tokenize.TokenError as error:
      message, (line, _) = error.args
      raise UserError(f'{place(line)}: {message}') from None
    except _MISTAKES as error:
      with _located(place(parser.current_token.start[0] if parser else 1)):
        raise error
    if statement is None:
      return
    yield statement, place(statement.location.line_num)


def _explained(error: SyntaxError) -> str:
  """Returns gin's error in one line, with a remedy for a bare word."""
  message = str(error.msg)
  word = re.search(r"Failed to parse token '(\w+)'$", message)
  if word is None:
    return message.splitlines()[0]
  meant = values.WORDS.get(word[1].lower(), word[1])
  return f'{word[1]} is no value of gin: write {meant!r}'


def literal(flag: str, value: str) -> str:
  """Returns the value in gin's notation, with quotes around a bare word.

  Raises:
    UserError: the value is an invalid literal rather than a bare word.
  """
  if not value.strip():
    raise UserError(f"{flag} has no value; write {flag}='' for empty text")
  try:
    parsed = list(config_parser.ConfigParser(f'x = {value}', _Syntax()))
    if len(parsed) == 1:
      return value
  except (SyntaxError, tokenize.TokenError):
    pass
  if value.lower() in ('true', 'false', 'none'):
    raise UserError(f'{flag}={value}: write {value.capitalize()}')
  number = value[0] in '+-.0123456789' and '/' not in value
  if number or value[0] in '\'"([{@%':
    raise UserError(
      f'{flag}={value}: not a gin value; if text, put it in quotes'
    )
  return repr(value)
