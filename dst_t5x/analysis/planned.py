"""What a run of a sweep tries that has left nothing yet.

Told as training would tell it: from the gin files and settings of the sweep,
and from the classes of the method. The model and the task are not imported.
"""

from collections.abc import Mapping
import contextlib
import functools
import pathlib
from typing import Any

from dst_t5x.analysis import setups
from dst_t5x.core.errors import UserError

_METHOD_FILE = 'method'


def trial(settings: Mapping[str, str]) -> setups.Trial:
  """Returns what a sweep says of a run.

  Args:
    settings: key of the sweep's file -> value, as gin reads it.
  """
  return _trial(tuple(sorted(settings.items())))


@functools.lru_cache(maxsize=1024)
def _trial(pairs: tuple[tuple[str, str], ...]) -> setups.Trial:
  from dst_t5x.config import gin_files  # Few need it.
  from dst_t5x.launch import grid

  settings = dict(pairs)
  files = grid.files(settings)
  flags = {k: v for k, v in settings.items() if k not in grid.FILES}
  said: dict[str, Any] = {}
  for file in files.values():
    with contextlib.suppress(UserError):  # It is not on this machine.
      said |= gin_files.literals(file)
  said |= gin_files.literals_of_flags(flags)
  is_from_scratch = any(name.endswith('train.from_scratch') for name in said)
  task = said.get('MIXTURE_OR_TASK_NAME') or _stem(settings.get('task', ''))
  method = _stem(settings.get(_METHOD_FILE, 'full'))
  setup = setups.Setup(_stem(settings.get('model', '')), str(task), method)
  if is_from_scratch:
    setup = setups.Setup(setup.model, setup.task, setups.PRETRAINING)
  elif (found := _method(files.get(_METHOD_FILE), flags, said)) is not None:
    setup = setups.with_method(setup, found)
  return setups.Trial(
    setup,
    setups.rate_of(said.get('LEARNING_RATE')),
    int(said.get('RANDOM_SEED') or 0),
  )


def _method(
  file: str | None, flags: Mapping[str, str], said: Mapping[str, Any]
) -> dict[str, Any] | None:
  """Returns what `run.json` will say of the method.

  Args:
    file: its gin file.
    flags: name -> value of `--gin.NAME=VALUE`.
    said: macro -> value, of all files and flags.

  Returns:
    None if it cannot be told, as the file or its classes are not here.
  """
  from dst_t5x.config import described
  from dst_t5x.runs import methods

  try:
    projection, adapter, trained = described.macros(
      [file] if file else [], flags, said, _MACROS
    )
    return methods.settings(projection, adapter, trained)
  except (ImportError, UserError):
    return None


_MACROS = ('PROJECTION', 'ADAPTER', 'TRAINED')


def _stem(value: str) -> str:
  return pathlib.PurePath(value).stem if value.endswith('.gin') else value
