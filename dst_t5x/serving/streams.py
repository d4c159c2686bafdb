"""Answers that are handed on while their tokens are decoded."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
import dataclasses
import functools
import math
import time
from typing import Literal, NamedTuple

from dst_t5x.core.errors import UserError
from dst_t5x.models import decoding
from dst_t5x.serving import growing_text
from dst_t5x.serving import model as model_lib
from dst_t5x.serving import requests as requests_lib
from dst_t5x.serving import running as running_lib
from dst_t5x.serving import texts as texts_lib

Finish = Literal['stop', 'length']


@dataclasses.dataclass(frozen=True)
class Settings:
  """How answers are decoded.

  Attributes:
    limit: the most tokens of an answer.
    ends: the ids of the tokens that end an answer.
    sampling: how tokens are drawn; None for the most probable ones.
    stops: strings that end an answer.
    alternatives: whether the most probable tokens are wanted.
  """

  limit: int
  ends: frozenset[int]
  sampling: decoding.Sampling | None = None
  stops: tuple[str, ...] = ()
  alternatives: bool = False


class Piece(NamedTuple):
  """A piece of an answer.

  Attributes:
    number: of the prompt in its request.
    text: the text that is new; '' while it is not certain.
    token: the token that is new; None for the end token.
    offset: the number of characters before the token.
    finish: why the answer ends here; None if it goes on.
  """

  number: int
  text: str
  token: running_lib.Token | None
  offset: int
  finish: Finish | None = None


class Stream:
  """The answers to the prompts of one request.

  Attributes:
    requests: to the decoding thread, one for each prompt.
    tokens: how many were decoded so far, with end tokens.
  """

  def __init__(
    self,
    rows: Sequence[model_lib.Row],
    mixes: bool,
    texts: texts_lib.Texts,
    settings: Settings,
    until: float,
  ) -> None:
    """Makes requests, which the caller submits.

    Args:
      rows: the prompts.
      mixes: see `requests.Request`.
      texts: what decodes the answers.
      settings: how they are decoded.
      until: the deadline, a time.monotonic().
    """
    self.tokens = 0
    self._settings = settings
    self._until = until
    self._loop = asyncio.get_running_loop()
    self._events: asyncio.Queue[
      tuple[int, running_lib.Token | BaseException | None]
    ] = asyncio.Queue()
    self._counts = [0] * len(rows)
    self._texts = [
      growing_text.GrowingText(texts.decode, settings.stops) for _ in rows
    ]
    self.requests = [self._request(i, row, mixes) for i, row in enumerate(rows)]

  def _request(
    self, number: int, row: model_lib.Row, mixes: bool
  ) -> requests_lib.Request:
    settings, greedy = self._settings, self._settings.sampling is None
    request = requests_lib.Request(
      row,
      model_lib.GREEDY if greedy else model_lib.SAMPLING,
      mixes,
      self._until,
      settings.limit,
      settings.ends,
      settings.alternatives,
      on_token=functools.partial(self._post, number),
    )
    request.future.add_done_callback(
      lambda future: (
        None if future.cancelled() else self._post(number, future.exception())
      )
    )
    return request

  def _post(
    self, number: int, event: running_lib.Token | BaseException | None
  ) -> None:
    """Hands something on from the decoding thread."""
    self._loop.call_soon_threadsafe(self._events.put_nowait, (number, event))

  async def pieces(self) -> AsyncGenerator[Piece, None]:
    """Yields pieces until all answers have ended; to be called once.

    Raises:
      UserError: a subset cannot be used, logits are not finite, or the deadline
        has passed. The requests are stopped then, too.
    """
    going_on = set(range(len(self.requests)))
    try:
      while going_on:
        number, event = await self._next()
        if number not in going_on:
          continue
        piece = self._piece(number, event)
        if piece.finish is not None:
          going_on.remove(number)
        yield piece
    finally:
      for request in self.requests:
        request.stop()

  async def _next(self) -> tuple[int, running_lib.Token | None]:
    try:
      async with asyncio.timeout(self._until - time.monotonic()):
        number, event = await self._events.get()
    except TimeoutError as e:
      raise requests_lib.DeadlineError(
        'no answer within the deadline of the request'
      ) from e
    if isinstance(event, BaseException):
      raise event
    return number, event

  def _piece(self, number: int, token: running_lib.Token | None) -> Piece:
    """Returns the piece of a token; None for an answer without any."""
    text, offset = self._texts[number], len(self._texts[number])
    if token is None:
      return Piece(number, '', None, 0, 'stop')
    if not math.isfinite(token.logprob):
      raise UserError(
        'the subset makes logits that are not finite: its values are too large'
        ' for the model'
      )
    self.tokens += 1
    self._counts[number] += 1
    if token.id in self._settings.ends:
      return Piece(number, text.end(), None, offset, 'stop')
    new = text.add(token.id)
    if text.is_stopped:
      self.requests[number].stop()
      return Piece(number, new, token, offset, 'stop')
    if self._counts[number] == self._settings.limit:
      return Piece(number, new + text.end(), token, offset, 'length')
    return Piece(number, new, token, offset)
