"""What gin will call, and with which settings, defaults included.

Gin's bindings are flat, and keyed by where a function is defined. Here they
become the tree of calls that gin makes of them: macros replaced by their
values, references by what they refer to, scopes by what counts in them. Nothing
is called.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import enum
import functools
import inspect
from typing import Any, NamedTuple

from gin import config as gin_config

from dst_t5x.config import check
from dst_t5x.config import gin_files
from dst_t5x.config import gin_names
from dst_t5x.core import stable_ids
from dst_t5x.core import values
from dst_t5x.core.errors import UserError

_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
# What a function that is given away has where it is called outside its scope.
_UNSCOPED = 'unscoped'
# Flax's modules have them, and they say nothing of what a module computes.
_OF_FLAX = ('parent', 'name')


class Call(NamedTuple):
  """A function or class with its settings.

  Attributes:
    function: what is called.
    settings: parameter -> value: numbers, texts, lists, dictionaries, calls.
    defaults: those parameters that gin does not bind.
    is_called: whether gin calls it; else it is given away as a function.
  """

  function: Callable[..., Any]
  settings: Mapping[str, Any]
  defaults: frozenset[str]
  is_called: bool = True

  def make(self) -> Any:
    """Calls the function with what gin binds, and so on inside."""
    return self.partial()()

  def partial(self) -> Callable[..., Any]:
    """Returns the function with what gin binds."""
    bound = {
      name: _made(value)
      for name, value in self.settings.items()
      if name not in self.defaults and name != _UNSCOPED
    }
    return functools.partial(self.function, **bound)


def calls(
  binary: Callable[..., Any],
) -> tuple[Call, list[tuple[str, Call]]]:
  """Returns what gin is configured to call.

  Args:
    binary: a module's function, as given to `binaries.parse`.

  Returns:
    The call of the binary; and with their scopes those that code makes without
    a reference in gin's files, of functions that their own module registers.
  """
  unreferenced = []
  for scope, selector in sorted(gin_config._CONFIG):
    configurable = gin_config._REGISTRY[selector]
    if check.is_registered_by_its_module(configurable):
      call = _call(configurable, check.components(scope), True)
      unreferenced.append((scope, call))
  configurable = gin_names.reference_to(binary).configurable
  return _call(configurable, (), True), unreferenced


def macros(
  files: Sequence[str],
  flags: Mapping[str, str],
  known: Mapping[str, Any],
  names: Sequence[str],
) -> list[Any]:
  """Returns values of macros where only some of a binary's files are read.

  This replaces gin's configuration.

  Args:
    files: gin files; what they import is imported.
    flags: name -> value of `--gin.NAME=VALUE`; those that these files do not
      understand are ignored.
    known: macro -> value, of those that other files define.
    names: macros; one that nothing defines is None.

  Raises:
    UserError: a file does not exist, or makes no sense.
  """
  gin_config.clear_config()
  for name, value in known.items():
    if '.' not in name and value is not None:
      gin_config.bind_parameter((name, 'gin.macro', 'value'), value)
  for file in files:
    gin_files.read_file(file, {})
  for flag in flags.items():
    with contextlib.suppress(UserError):
      gin_files.read_flags([flag], {})
  found = []
  for name in names:
    bound = gin_config._CONFIG.get((name, 'gin.macro'), {})
    found.append(_value(bound.get('value'), (name,)))
  return found


def _call(configurable: Any, scope: tuple[str, ...], is_called: bool) -> Call:
  """Returns a configurable as it would be called in a scope."""
  function = configurable.wrapped
  defaults = {
    name: _of_default(parameter.default)
    for name, parameter in values.parameters(function).items()
    if parameter.kind not in _VARIADIC
    and parameter.default is not inspect.Parameter.empty
    and name not in _OF_FLAX
  }
  bound = {
    name: _value(value, scope)
    for name, (_, value) in check.effective(scope, configurable).items()
  }
  return Call(
    function,
    {**defaults, **bound},
    frozenset(defaults.keys() - bound.keys()),
    is_called,
  )


def _value(value: Any, scope: tuple[str, ...]) -> Any:
  """Returns a bound value with references replaced."""
  if isinstance(value, Mapping):
    return {k: _value(item, scope) for k, item in value.items()}
  if isinstance(value, list | tuple):
    return [_value(item, scope) for item in value]
  if not isinstance(value, gin_config.ConfigurableReference):
    return value
  own = tuple(value.scopes) or scope
  if value.configurable.selector == 'gin.constant':
    return _of_default(value.scoped_configurable_fn())
  if value.configurable.selector != 'gin.macro':
    call = _call(value.configurable, own, value.evaluate)
    outside = _call(value.configurable, (), False)
    # The code that is handed it may call it outside the scope.
    if value.evaluate or value.scopes or outside.settings == call.settings:
      return call
    return call._replace(settings={**call.settings, _UNSCOPED: outside})
  _, held = check.effective(own, value.configurable)['value']
  return _value(held, own)


def _of_default(value: Any) -> Any:
  """Returns a default as gin would bind it, or what comes nearest to that."""
  if value is None or isinstance(value, bool | int | float | str):
    return value
  if isinstance(value, Mapping):
    return {key: _of_default(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [_of_default(item) for item in value]
  if isinstance(value, enum.Enum):
    return value.name
  if dataclasses.is_dataclass(value) and not isinstance(value, type):
    fields = {
      field.name: _of_default(getattr(value, field.name))
      for field in dataclasses.fields(value)
    }
    return Call(type(value), fields, frozenset(fields))
  # A type or function; of anything else no more can be told than its class.
  return stable_ids.stable_id(value)


def _made(value: Any) -> Any:
  if isinstance(value, Call):
    return value.make() if value.is_called else value.partial()
  if isinstance(value, Mapping):
    return {key: _made(item) for key, item in value.items()}
  if isinstance(value, list):
    return [_made(item) for item in value]
  return value


def to_json(value: Any) -> Any:
  """Returns a value with its calls as objects: their `id` and their settings.

  A function that is given away has `function` for its id.
  """
  if isinstance(value, Call):
    key = 'id' if value.is_called else 'function'
    said = {key: stable_ids.stable_id(value.function)}
    return said | {k: to_json(item) for k, item in value.settings.items()}
  if isinstance(value, Mapping):
    return {str(key): to_json(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [to_json(item) for item in value]
  return value


def defaults_in(value: Any) -> frozenset[str]:
  """Returns the settings that gin does not bind: `trainer.loss.z_loss`."""
  return frozenset('.'.join(path) for path in _default_paths(value, ()))


def _default_paths(
  value: Any, path: tuple[str, ...]
) -> Iterator[tuple[str, ...]]:
  is_call = isinstance(value, Call)
  inside = value.settings if is_call else value
  if isinstance(inside, Mapping):
    for name, item in inside.items():
      if is_call and name in value.defaults:
        yield (*path, name)
      yield from _default_paths(item, (*path, str(name)))
