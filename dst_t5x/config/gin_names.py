"""Finds what a name in a gin file refers to, or the nearest known name.

With dynamic registration (`from __gin__ import dynamic_registration`), a name
refers to one of the file's own imports; otherwise to anything registered.
"""

from collections.abc import Iterator
import contextlib
import importlib
import pkgutil
import sys
from typing import Any

from gin import config as gin_config
from gin import config_parser

from dst_t5x.core import extras
from dst_t5x.core import values
from dst_t5x.core.errors import UserError, nearest


class FileNames(gin_config.ParseContext):
  """The names that a gin file may use: those that it imports."""

  def process_import(self, statement: Any) -> None:
    """Imports a module, or enables a feature of gin."""
    if not statement.module.startswith('__gin__.'):
      _import(statement.module)
    super().process_import(statement)

  def get_configurable(self, selector: str) -> Any:
    """Returns the configurable of a selector; registers it if necessary."""
    if not self._dynamic_registration:
      return _registered(selector)
    first, *rest = selector.split('.')
    if first not in self._symbol_table:
      hint = nearest(first, self._symbol_table)
      raise UserError(f'{first!r} of {selector!r} is not imported here{hint}')
    owner = self._symbol_table[first]
    for name in rest:
      if not hasattr(owner, name):
        hint = nearest(name, (n for n in vars(owner) if not n.startswith('_')))
        raise UserError(f'there is no {selector!r}: no {name!r}{hint}')
      owner = getattr(owner, name)
    if not callable(owner):
      raise UserError(f'{selector!r} is neither a function nor a class')
    return super().get_configurable(selector)


class FlagNames(FileNames):
  """The names that a flag may use: any unique ending, and all files' imports.

  T5X's users write `--gin.T5Config.dropout_rate=0.1`. A flag may also name what
  no file has named, as in `--gin.DECODER=@decoding.BeamSearch()`.
  """

  def __init__(self, binary: Any) -> None:
    super().__init__()
    references = gin_config.iterate_references(gin_config._CONFIG)
    self._in_use = {selector for _, selector in gin_config._CONFIG}
    self._in_use |= {found.configurable.selector for found in references}
    if binary is not None:
      self._in_use.add(binary.configurable.selector)
    self._enable_dynamic_registration()
    for statement in sorted(gin_config._IMPORTS, key=lambda s: s.module):
      if not statement.module.startswith('__gin__'):
        self.process_import(statement)

  def get_configurable(self, selector: str) -> Any:
    """Returns the configurable of a selector; registers it if necessary."""
    known = gin_config._REGISTRY.matching_selectors(selector)
    # Other packages register names that this configuration does not use.
    in_use = self._in_use.intersection(known)
    if len(in_use) == 1:
      return gin_config._REGISTRY[in_use.pop()]
    if known or selector.split('.')[0] not in self._symbol_table:
      return _registered(selector)
    return super().get_configurable(selector)


@contextlib.contextmanager
def names(known: FileNames) -> Iterator[FileNames]:
  """Makes gin look up names in `known`."""
  gin_config._PARSE_CONTEXTS.append(known)
  try:
    yield known
  finally:
    gin_config._PARSE_CONTEXTS.pop()


def reference_to(function: Any) -> Any:
  """Returns gin's reference to the result of calling a module's function."""
  package, _, module = function.__module__.rpartition('.')
  statement = config_parser.ImportStatement(
    function.__module__, is_from=bool(package), alias=None, location=None
  )
  with names(FileNames()) as known:
    known._enable_dynamic_registration()
    known.process_import(statement)
    selector = f'{module}.{function.__qualname__}'
    return gin_config.ConfigurableReference(selector, evaluate=True)


def full_name(configurable: Any) -> str:
  """Returns `module.Class`, independent of the names in gin files."""
  wrapped = configurable.wrapped
  if hasattr(wrapped, '__module__') and hasattr(wrapped, '__qualname__'):
    return f'{wrapped.__module__}.{wrapped.__qualname__}'
  return configurable.selector


def check_parameter(configurable: Any, selector: str, parameter: str) -> None:
  """Raises UserError if the configurable has no such parameter."""
  if not gin_config._might_have_parameter(configurable.wrapped, parameter):
    hint = nearest(parameter, values.parameters(configurable.wrapped))
    raise UserError(f'{selector} has no parameter {parameter!r}{hint}')


def _import(module: str) -> None:
  """Imports a module; raises UserError if it does not exist."""
  try:
    importlib.import_module(module)
  except UserError:
    raise
  except ModuleNotFoundError as error:
    if extras.is_of_tasks(error.name):
      raise extras.missing(str(error.name)) from None
    parent, _, last = module.rpartition('.')
    hint = ''
    if error.name == module and parent in sys.modules:
      siblings = pkgutil.iter_modules(sys.modules[parent].__path__)
      hint = nearest(last, (sibling.name for sibling in siblings))
    raise UserError(f'there is no module {error.name!r}{hint}') from None
  except Exception as error:
    raise ImportError(f'{module} cannot be imported') from error


def _registered(selector: str) -> Any:
  matches = gin_config._REGISTRY.matching_selectors(selector)
  if len(matches) > 1:
    raise UserError(f'{selector!r} may be any of {", ".join(sorted(matches))}')
  if not matches:
    length = selector.count('.') + 1
    endings = (
      '.'.join(known.split('.')[-length:])
      for known, _ in gin_config._REGISTRY.items()
    )
    raise UserError(f'there is no {selector!r}{nearest(selector, endings)}')
  return gin_config._REGISTRY[matches[0]]
