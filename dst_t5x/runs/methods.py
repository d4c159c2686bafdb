"""The record of a run's method in `run.json`, under the key `method`.

It is an object with the method's name, `method`, and its settings. Names:

    full        all parameters are trained
    dst, random, …   a projection; the name comes from its `settings`
    lora, prompt, ia3, …   an adapter; the name is the id of its class
    norms, head_only, …   some parameters are `trained`; the name is that of the
                package's method file with the same TRAINED, or else `partial`
    own         a user's code makes the trainer; there are no settings

With a projection, an adapter or `trained` is a further setting.
"""

from collections.abc import Sequence
import dataclasses
import functools
from typing import Any

from dst_t5x.config import described
from dst_t5x.config import gin_files

NAME = 'method'
FULL = 'full'
_PARTIAL = 'partial'
_OWN = 'own'


def settings(
  projection: described.Call | None,
  adapter: described.Call | None,
  trained: Sequence[str] | None,
) -> dict[str, Any]:
  """Returns the name and the settings of a method.

  Args:
    projection: the trainer's projection; None if a user's code makes the
      trainer.
    adapter: the network's adapter.
    trained: TRAINED.

  Raises:
    UserError: a setting is invalid.
  """
  if projection is None:
    return {NAME: _OWN}
  made = projection.make()
  own = made.settings()
  # A method can leave out settings that have no effect beside its others.
  fields = {f.name for f in dataclasses.fields(made)}
  said = {
    name: value
    for name, value in _settings(projection).items()
    if name not in fields - own.keys()
  } | own
  if adapter is not None:
    from_outside = _settings(adapter)
    if said == {NAME: FULL}:
      said = from_outside
    else:
      said['adapter'] = from_outside
  if trained:
    if said == {NAME: FULL}:
      said[NAME] = _by_trained().get(tuple(trained), _PARTIAL)
    said['trained'] = list(trained)
  return said


def _settings(call: described.Call) -> dict[str, Any]:
  said = described.to_json(call)
  return {NAME: said.pop('id'), **said}


@functools.cache
def _by_trained() -> dict[tuple[str, ...], str]:
  """Returns TRAINED -> name of the package's method file that sets it."""
  of_files = {
    file.rpartition('/')[2].removesuffix('.gin'): gin_files.literals(file)
    for file in gin_files.shipped()
    if file.startswith('gin/methods/')
  }
  return {
    tuple(said['TRAINED']): name
    for name, said in of_files.items()
    if 'TRAINED' in said
  }
