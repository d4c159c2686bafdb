"""The one exception that a user's mistake raises."""

from collections.abc import Iterable
import difflib


class UserError(Exception):
  """A mistake of the user's: one line that names the thing and the remedy."""


def nearest(name: str, known: Iterable[str]) -> str:
  """Returns `; did you mean 'x'?` for the nearest known name, or nothing."""
  matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
  return f'; did you mean {matches[0]!r}?' if matches else ''
