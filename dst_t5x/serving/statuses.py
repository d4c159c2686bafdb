"""HTTP's status of each kind of error."""

from dst_t5x.core.errors import UserError
from dst_t5x.serving import library
from dst_t5x.serving import refusals
from dst_t5x.serving import requests

_STATUS: dict[type[UserError], int] = {
  library.NotFoundError: 404,
  refusals.ModelNotFoundError: 404,
  library.TooLargeError: 413,
  library.FullError: 507,
  requests.BusyError: 429,
  requests.DrainingError: 503,
  requests.DeadlineError: 504,
}


def of(error: UserError) -> int:
  """Returns the status of an error."""
  return _STATUS.get(type(error), 422)
