"""Which parameters a method trains: all, named ones, or an adapter's."""

from collections.abc import Sequence

from dst_t5x.core.errors import UserError
from dst_t5x.method import api as methods
from dst_t5x.models import api


def expressions(
  network: api.Network,
  projection: methods.Projection,
  trained: Sequence[str] | None = None,
) -> Sequence[str]:
  """Returns regular expressions for the paths of the trained parameters.

  Args:
    network: the model. If it has an adapter, only the adapter is trained.
    projection: the method.
    trained: TRAINED, such expressions; None for all parameters.

  Raises:
    UserError: the arguments contradict each other.
  """
  if isinstance(trained, str):
    raise UserError(f'TRAINED is a list of expressions, not {trained!r}')
  adapter = network.adapter
  if not adapter.added:
    return trained or ['.*']
  if projection.constrains:
    raise UserError(
      f'{type(adapter).__name__} adds parameters that no seed has, and the '
      'projection ties all to a seed: use one method file'
    )
  if trained:
    raise UserError(
      f'{type(adapter).__name__} trains what it adds and nothing else: use '
      'it without TRAINED'
    )
  return [adapter.added]
