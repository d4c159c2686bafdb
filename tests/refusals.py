"""What a call says against its input."""

from collections.abc import Callable
from typing import Any

from dst_t5x.core import errors


def refusal(function: Callable[..., Any], *arguments: Any) -> str | None:
  """Returns the one line that a call ends with, None if it does not.

  Any other exception than UserError passes through.
  """
  try:
    function(*arguments)
  except errors.UserError as error:
    line = str(error)
  else:
    return None
  assert line
  assert line.isprintable(), line
  assert len(line.encode()) < 1000, line
  return line
