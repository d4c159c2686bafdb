"""The text of an answer while its tokens are decoded."""

from collections.abc import Callable, Sequence

# What a tokenizer makes of bytes that are no whole character yet.
_HALF = '\ufffd'


class GrowingText:
  """Gives out text that no later token can change.

  Text that may be the beginning of a stop string is held back, and so are the
  bytes of a character that is not complete.

  Attributes:
    is_stopped: whether there was a stop string. It is no part of the text, and
      neither is what follows it.
  """

  def __init__(
    self, decode: Callable[[list[int]], str], stops: Sequence[str]
  ) -> None:
    """Begins with no text.

    Args:
      decode: returns the text of tokens.
      stops: the stop strings.
    """
    self.is_stopped = False
    self._decode = decode
    self._stops = stops
    self._ids: list[int] = []
    self._text = ''
    self._given = ''

  def __len__(self) -> int:
    return len(self._text)

  def add(self, number: int) -> str:
    """Adds a token, and returns the text that is certain now."""
    self._ids.append(number)
    self._text = self._decode(self._ids)
    places = [self._text.find(stop) for stop in self._stops]
    if found := [place for place in places if place >= 0]:
      self.is_stopped = True
      self._text = self._text[: min(found)]
      return self.end()
    held = self._held()
    return self._give(self._text[: len(self._text) - held])

  def end(self) -> str:
    """Returns the text that was held back."""
    return self._give(self._text)

  def _held(self) -> int:
    """Returns how many characters at the end may change."""
    text = self._text
    halves = len(text) - len(text.rstrip(_HALF))
    beginnings = (
      size
      for stop in self._stops
      for size in range(1, min(len(stop), len(text) + 1))
      if text.endswith(stop[:size])
    )
    return max(halves, max(beginnings, default=0))

  def _give(self, text: str) -> str:
    # A tokenizer that changes what it has said is waited for.
    if not text.startswith(self._given):
      return ''
    new = text[len(self._given) :]
    self._given = text
    return new
