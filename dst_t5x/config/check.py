"""Finds bindings without effect, missing values and invalid values.

Gin silently ignores a binding that nothing refers to. This module follows
references from the binary through its bindings in the way gin does when it
calls them. A macro refers to its value; `@scope/name` refers to the bindings of
its scope and of the scopes around it.
"""

from collections.abc import Iterable, Iterator, Mapping
import inspect
import os
from typing import Any

from gin import config as gin_config

from dst_t5x.config import gin_files
from dst_t5x.config import gin_names
from dst_t5x.config.gin_files import Author
from dst_t5x.config.gin_files import Key
from dst_t5x.config.gin_files import Origins
from dst_t5x.core import values
from dst_t5x.core.errors import UserError, nearest


class Reach:
  """What gin reaches from some references.

  Attributes:
    used: all bindings of what is reached, including those that an inner scope
      overrides.
    bindings: the bindings that are in effect, with their values.
    macros: names of the macros that are referred to.
    missing: flags that set required values without a value.
  """

  def __init__(self, references: Iterable[Any]) -> None:
    self.used: set[Key] = set()
    self.bindings: dict[Key, Any] = {}
    self.macros: set[str] = set()
    self.missing: list[str] = []
    self._seen: set[tuple[tuple[str, ...], str, bool]] = set()
    for reference in references:
      self._follow(reference, ())
    for scope, selector in list(gin_config._CONFIG):
      configurable = gin_config._REGISTRY[selector]
      if is_registered_by_its_module(configurable):
        self._visit(configurable, components(scope), called=False)

  def _follow(self, value: Any, scope: tuple[str, ...]) -> None:
    """Visits every reference in a value that is evaluated in a scope."""
    if isinstance(value, gin_config.ConfigurableReference):
      own = tuple(value.scopes)
      self._visit(value.configurable, own or scope, value.evaluate)
      if not own and not value.evaluate:
        # The code that receives the reference may call it outside the scope.
        self._visit(value.configurable, (), called=False)
    elif isinstance(value, Mapping):
      for item in [*value.keys(), *value.values()]:
        self._follow(item, scope)
    elif isinstance(value, list | tuple):
      for item in value:
        self._follow(item, scope)

  def _visit(
    self, configurable: Any, scope: tuple[str, ...], called: bool
  ) -> None:
    """Collects a configurable's bindings; follows those that are in effect."""
    selector = configurable.selector
    if (scope, selector, called) in self._seen:
      return
    self._seen.add((scope, selector, called))
    self.used.update(key for key, _ in _bound(scope, selector))
    counting = effective(scope, configurable)
    if selector == 'gin.macro':
      self.macros.add('/'.join(scope))
    if called:
      for parameter in _required(configurable.wrapped):
        if parameter not in counting:
          self.missing.append(_flag(Key('/'.join(scope), selector, parameter)))
    for key, value in counting.values():
      self.bindings[key] = value
      if _is_required(value):
        self.missing.append(_flag(key))
      self._follow(value, scope)


def is_registered_by_its_module(configurable: Any) -> bool:
  """Whether code may call it without a reference in gin's files."""
  return not configurable.import_source and configurable.module != 'gin'


def _bound(scope: tuple[str, ...], selector: str) -> Iterator[tuple[Key, Any]]:
  """Yields the bindings that a call sees, those of outer scopes first."""
  for depth in range(len(scope) + 1):
    prefix = '/'.join(scope[:depth])
    for parameter, value in gin_config._CONFIG.get(
      (prefix, selector), {}
    ).items():
      yield Key(prefix, selector, parameter), value


def effective(
  scope: tuple[str, ...], configurable: Any
) -> dict[str, tuple[Key, Any]]:
  """Returns the bindings that count where something is called.

  Args:
    scope: of the call, outer ones first.
    configurable: what is called.

  Returns:
    Parameter -> where it is bound, and to what.
  """
  bound = _bound(scope, configurable.selector)
  return {key.parameter: (key, value) for key, value in bound}


def check(binary: Any, origins: Origins) -> None:
  """Checks that every binding is used and every required value is set.

  Args:
    binary: gin's reference to the function that will be called.
    origins: the place of each binding.

  Raises:
    UserError: a binding is not used, values are missing, or a value does not
      fit its parameter. Names the first binding, the flags that set the missing
      values, or the first value.
  """
  macros = [
    config['value']
    for (_, selector), config in gin_config._CONFIG.items()
    if selector == 'gin.macro'
  ]
  reached = Reach([binary])
  # A file serves several binaries, and not every binary uses all its macros.
  anything = Reach([binary, *macros])
  for key, origin in origins.items():
    if origin.author is Author.PACKAGE:
      continue
    reach = reached if origin.author is Author.COMMAND_LINE else anything
    if key.is_macro and key.scope not in reach.macros:
      # The macro is not misspelt if a file of the package defines it too.
      if reach is anything and key.scope in gin_files.shipped_macros():
        continue
      place = f'{origin.place}: ' if reach is anything else ''
      hint = nearest(key.scope, reached.macros)
      raise UserError(
        f'{place}{key.scope} is not used by this configuration{hint}'
      )
    if not key.is_macro and key not in reach.used:
      raise UserError(
        f'{origin.place}: nothing in this configuration refers to '
        f'{_short(key)}, so {key.parameter} would have no effect'
      )
  if reached.missing:
    flags = ' '.join(f'{flag}=…' for flag in dict.fromkeys(reached.missing))
    raise UserError(f'values are missing: set {flags}')
  flat_bindings(binary)  # Raises at a macro without an end.
  _check_values(reached, origins)


def flat_bindings(binary: Any) -> dict[str, str]:
  """Returns all settings of the binary, with macros replaced by their values.

  Args:
    binary: gin's reference to the function that will be called.

  Raises:
    UserError: a macro refers to itself.

  Returns:
    Sorted `scope/module.Class.parameter` -> the value as text. References
    appear with their full names.
  """
  reached = Reach([binary])
  flat = {}
  for key, value in reached.bindings.items():
    if not key.is_macro:
      configurable = gin_config._REGISTRY[key.selector]
      scope = f'{key.scope}/' if key.scope else ''
      name = f'{scope}{gin_names.full_name(configurable)}.{key.parameter}'
      flat[name] = repr(_resolved(value, reached))
  return dict(sorted(flat.items()))


def _resolved(value: Any, reached: Reach, within: tuple[str, ...] = ()) -> Any:
  """Returns the value with macros and references replaced.

  References become `values.Reference`, whose `repr` is gin's notation.
  """

  def resolved(item: Any) -> Any:
    return _resolved(item, reached, within)

  if isinstance(value, Mapping):
    return {resolved(key): resolved(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return type(value)(map(resolved, value))
  if not isinstance(value, gin_config.ConfigurableReference):
    return value
  scope = '/'.join(value.scopes)
  if _is_macro(value):
    if scope in within:
      raise UserError(f'the macro {scope} refers to itself')
    key = Key(scope, 'gin.macro', 'value')
    return _resolved(reached.bindings[key], reached, (*within, scope))
  if value.configurable.selector == 'gin.constant':
    return value.scoped_configurable_fn()
  name = gin_names.full_name(value.configurable)
  call = '()' if value.evaluate else ''
  return values.Reference(
    f'@{scope}{"/" if scope else ""}{name}{call}',
    values.result_of(value.configurable.wrapped),
    value.evaluate,
  )


def _check_values(reached: Reach, origins: Origins) -> None:
  """Checks values against annotations; expands `~/x` in paths.

  Raises:
    UserError: a value does not fit; names the macro or the parameter.
  """
  for key, value in reached.bindings.items():
    if key.is_macro:
      continue
    known = values.parameters(gin_config._REGISTRY[key.selector].wrapped)
    if key.parameter not in known:
      continue  # The function takes any arguments.
    hint = values.hint_of(known[key.parameter])
    found, source = _resolved(value, reached), _source(key, reached)
    if not values.fits(found, hint):
      name = _flag(source).removeprefix('--gin.')
      place = _place(origins.get(source))
      raise UserError(f'{place}{values.mistake(name, found, hint)}')
    if isinstance(found, str) and values.is_path(hint):
      reached.bindings[source] = expanded = os.path.expanduser(found)
      gin_config.bind_parameter(tuple(source), expanded)


def _place(origin: gin_files.Origin | None) -> str:
  """Returns the place of a binding in a user's file; '' for a flag."""
  is_in_file = origin is not None and origin.author is Author.USER_FILE
  return f'{origin.place}: ' if origin and is_in_file else ''


def _source(key: Key, reached: Reach) -> Key:
  """Returns the binding that has the value: this one, or that of a macro."""
  while _is_macro(value := reached.bindings[key]):
    key = Key('/'.join(value.scopes), 'gin.macro', 'value')
  return key


def _is_macro(value: Any) -> bool:
  return (
    isinstance(value, gin_config.ConfigurableReference)
    and value.configurable.selector == 'gin.macro'
  )


def _required(function: Any) -> list[str]:
  """Returns the parameters that a call without arguments would lack."""
  variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
  return [
    name
    for name, parameter in values.parameters(function).items()
    if parameter.kind not in variadic
    and (
      parameter.default is inspect.Parameter.empty
      or parameter.default is gin_config.REQUIRED
    )
  ]


def components(scope: str) -> tuple[str, ...]:
  """Returns the parts of a scope, outer ones first."""
  return tuple(scope.split('/')) if scope else ()


def _is_required(value: Any) -> bool:
  return (
    isinstance(value, gin_config.ConfigurableReference)
    and value.configurable.selector == 'gin.constant'
    and value.scoped_configurable_fn() is gin_config.REQUIRED
  )


def _short(key: Key) -> str:
  """Returns the shortest scoped selector that works in a flag."""
  selector = gin_config._REGISTRY.minimal_selector(key.selector)
  return f'{key.scope}/{selector}' if key.scope else selector


def _flag(key: Key) -> str:
  name = key.scope if key.is_macro else f'{_short(key)}.{key.parameter}'
  return f'--gin.{name}'
