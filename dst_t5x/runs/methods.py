"""What `run.json` says of a run's method, under the key `method`.

An object with the method's name, `method`, and its settings:

    full        all parameters are trained
    dst, random, …   a projection, as its `settings` say
    lora, prompt, ia3, …   an adapter, by the id of its class
    norms, head_only, …   some parameters, `trained`: the method file of the
                package with the same TRAINED; of others `partial`
    own         a trainer that code of one's own makes, which says no more

Where an adapter or `trained` goes with a projection, it is another setting.
"""

from collections.abc import Sequence
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
  """Returns name and settings of a method.

  Args:
    projection: of the trainer; None where code of one's own makes it.
    adapter: of its network.
    trained: TRAINED.

  Raises:
    UserError: a setting makes no sense.
  """
  if projection is None:
    return {NAME: _OWN}
  said = _settings(projection) | projection.make().settings()
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
  """Returns TRAINED -> the method file of the package that sets it."""
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
