"""A request to the decoding thread, and why it may get no answer."""

from collections.abc import Callable
from concurrent import futures
import dataclasses
import time

from dst_t5x.core.errors import UserError
from dst_t5x.serving import model as model_lib
from dst_t5x.serving import running as running_lib


class BusyError(UserError):
  """The queue is full; the client can try again later."""


class DrainingError(UserError):
  """The server is shutting down and takes no more requests."""


class DeadlineError(UserError):
  """The request's deadline has passed."""


@dataclasses.dataclass(eq=False)
class Request:
  """An input that waits for its answer.

  Attributes:
    row: the input and its subset.
    decoder: greedy, `model.SAMPLING` or beam search.
    mixes: whether it can be in one batch with other subsets.
    deadline: the latest time.monotonic() at which decoding may begin.
    limit: the most tokens of the answer, where it is decoded token by token.
    ends: the ids that end the answer there.
    alternatives: see `running.Ask`.
    on_token: called there with each token, in the decoding thread.
    future: receives the answer.
    arrived: time.monotonic() when the request was made.
    is_alone: whether it shares no batch, because one with it has failed.
  """

  row: model_lib.Row
  decoder: model_lib.Decoder
  mixes: bool
  deadline: float
  limit: int
  ends: frozenset[int] = frozenset()
  alternatives: bool = False
  on_token: Callable[[running_lib.Token], None] | None = None
  future: 'futures.Future[model_lib.Answer]' = dataclasses.field(
    default_factory=futures.Future
  )
  arrived: float = dataclasses.field(default_factory=time.monotonic)
  is_alone: bool = False
  _is_stopped: bool = False
  _handed_on: int = 0

  @property
  def ask(self) -> running_lib.Ask:
    """What is to be decoded token by token."""
    return running_lib.Ask(self.row, self.decoder, self.alternatives)

  @property
  def steps(self) -> bool:
    """Whether tokens can be decoded one by one, without a search."""
    return self.decoder in (model_lib.GREEDY, model_lib.SAMPLING)

  def joins(self, first: 'Request') -> bool:
    """Returns whether it can be in one batch with `first`."""
    if self is first:
      return True
    if self.is_alone or first.is_alone:
      return False
    same = self.row.subset == first.row.subset
    return same or (self.mixes and first.mixes)

  def begin(self) -> bool:
    """Returns whether an answer is still wanted, when decoding begins."""
    if self.future.running():
      return not self._is_stopped
    return self.future.set_running_or_notify_cancel()

  def hand_on(self, number: int, token: running_lib.Token) -> None:
    """Hands a token on, once, even if it is decoded again after a failure."""
    if self.on_token is not None and number == self._handed_on:
      self.on_token(token)
      self._handed_on += 1

  def fail(self, error: Exception) -> None:
    """Gives the request an error for an answer."""
    if self.begin():
      self.future.set_exception(error)

  @property
  def is_stopped(self) -> bool:
    """Whether nobody wants more tokens."""
    return self._is_stopped

  def stop(self) -> None:
    """Says that nobody wants more tokens, from any thread."""
    self._is_stopped = True
    self.future.cancel()
