"""Which linear maps an adapter_config.json adapts, by the rules of PEFT.

Those of `peft.tuners.tuners_utils.check_target_module_exists`: the tensors
beside it may be only half of the adapter, or more than PEFT would load.
"""

from collections.abc import Collection, Iterator, Mapping
import contextlib
import re

from dst_t5x.core import json_object
from dst_t5x.core.errors import UserError
from dst_t5x.models import hugging_face

# Where the number of a layer stands: PEFT takes the first number of a name now,
# `stack.block.<here>.layer.0.…`, and took the last one before.
_FIRST_NUMBER, _LAST_NUMBER = '.*?', '.*'


def adapted(
  stated: json_object.JsonObject,
  family: hugging_face.Family,
  names: Mapping[str, str],
  found: Collection[str],
) -> set[str]:
  """Returns the paths of the linear maps that an adapter_config.json adapts.

  Args:
    stated: its content.
    family: the base's.
    names: path of each of the base's linear maps -> PEFT's name.
    found: of those that have tensors, to tell the versions of PEFT apart.

  Raises:
    UserError: an entry has the wrong type, or none of the base is adapted.
  """
  kind = stated.get('peft_type', str, '')
  targets = _names(stated, 'target_modules')
  if targets is None:
    targets = family.default_targets.get(kind)
  if targets is None:
    return set()  # A prompt, which is in no linear map.
  excluded = _names(stated, 'exclude_modules') or []
  chosen = {
    module: name
    for module, name in names.items()
    if _matches(stated, 'target_modules', targets, name, family.head)
    and not _matches(stated, 'exclude_modules', excluded, name)
  }
  layers = _layers(stated)
  patterns = _names(stated, 'layers_pattern') or ['[^.]*']
  if layers and isinstance(targets, list):
    patterns = [patterns] if isinstance(patterns, str) else patterns
    chosen_by = [
      {
        module
        for module, name in chosen.items()
        if name in targets or _number(stated, name, before, patterns) in layers
      }
      for before in (_FIRST_NUMBER, _LAST_NUMBER)
    ]
    modules = chosen_by[chosen_by[1] == set(found)]
  else:
    modules = set(chosen)
  if not modules:
    raise UserError(
      f'{stated.where}: target_modules {json_object.shown(targets)} fit no'
      ' linear map of the base'
    )
  return modules


def _names(stated: json_object.JsonObject, key: str) -> str | list[str] | None:
  """Returns an entry that is a regular expression, or a list of names."""
  value = stated.content.get(key)
  if value is None or isinstance(value, str):
    return value
  if isinstance(value, list) and all(isinstance(x, str) for x in value):
    return value
  raise stated.refusal(key, 'must be a text or a list of texts')


def _layers(stated: json_object.JsonObject) -> list[int]:
  """Returns the numbers of the layers that are adapted; of all, none."""
  value = stated.content.get('layers_to_transform')
  if value is None:
    return []
  numbers = value if isinstance(value, list) else [value]
  if any(type(x) is not int for x in numbers):
    raise stated.refusal(
      'layers_to_transform', 'must be a whole number or a list of them'
    )
  return numbers


def _matches(
  stated: json_object.JsonObject,
  key: str,
  names: str | list[str],
  name: str,
  head: str | None = None,
) -> bool:
  """Whether a module of PEFT's is one of those that an entry names.

  Args:
    stated: see `adapted`.
    key: of the entry.
    names: the entry.
    name: the module's.
    head: the module that 'all-linear' leaves out; None where that is no name
      for all.
  """
  if isinstance(names, list):
    return any(name == n or name.endswith(f'.{n}') for n in names)
  if names.lower() == 'all-linear' and head is not None:
    return name != head
  with _expression(stated, key):
    return bool(re.fullmatch(names, name))


def _number(
  stated: json_object.JsonObject, name: str, before: str, patterns: list[str]
) -> int | None:
  """Returns the number of the layer in a module's name, None if it has none."""
  with _expression(stated, 'layers_pattern'):
    for pattern in patterns:
      match = re.match(rf'(?:^|{before}\.){pattern}\.(\d+)\.', name)
      if match:
        return int(match[match.re.groups])
  return None


@contextlib.contextmanager
def _expression(stated: json_object.JsonObject, key: str) -> Iterator[None]:
  """Raises UserError where an entry is no regular expression."""
  try:
    yield
  except (re.error, OverflowError, RecursionError) as e:
    raise stated.refusal(key, 'must be a regular expression') from e
