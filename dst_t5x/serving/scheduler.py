"""Requests that wait, and which of them are decoded together.

The oldest request is always served next, so none waits for ever. Others join
it: those with the same subset, and, where theirs can be mixed with its, those
with other subsets. A batch that is not full waits for more until the oldest of
it has waited for `max_wait`.
"""

from collections.abc import Callable
from concurrent import futures
import dataclasses
import threading
import time

from absl import logging

from dst_t5x.core.errors import UserError
from dst_t5x.serving import model as model_lib


class BusyError(UserError):
  """The queue is full: the request may be made again later."""


class DrainingError(UserError):
  """The server is ending: the request may be made elsewhere."""


class DeadlineError(UserError):
  """The request has waited for as long as it wanted to."""


@dataclasses.dataclass(eq=False)
class Request:
  """An input that waits for its answer.

  Attributes:
    row: what to decode.
    decoder: greedy or beam search.
    mixes: whether it may be in one batch with other subsets.
    deadline: time.monotonic() until which it wants to be begun.
    future: gets the answer.
    arrived: time.monotonic() when it was made.
  """

  row: model_lib.Row
  decoder: model_lib.Decoder
  mixes: bool
  deadline: float
  future: 'futures.Future[model_lib.Answer]' = dataclasses.field(
    default_factory=futures.Future
  )
  arrived: float = dataclasses.field(default_factory=time.monotonic)

  def joins(self, first: 'Request') -> bool:
    """Returns whether it can be decoded together with another."""
    if self.decoder != first.decoder:
      return False
    same = self.row.subset == first.row.subset
    return same or (self.mixes and first.mixes)


class Scheduler:
  """A bounded queue and the one thread that uses the model."""

  def __init__(
    self,
    model: model_lib.MultiSubsetModel,
    *,
    max_queue: int = 256,
    max_batch: int = 16,
    max_wait: float = 0.002,
    watch: Callable[[list[Request], float], None] | None = None,
  ) -> None:
    """Starts the thread.

    Args:
      model: nobody else may use it from now on.
      max_queue: requests that may wait.
      max_batch: requests that are decoded together.
      max_wait: seconds that a request may wait for others to join it.
      watch: is told of each batch, and the seconds that it took.
    """
    self._model = model
    self._max_queue = max_queue
    self._max_batch = max_batch
    self._max_wait = max_wait
    self._watch = watch or (lambda batch, seconds: None)
    self._waiting: list[Request] = []
    self._changed = threading.Condition()
    self._open = True
    # A daemon: a second Ctrl-C ends the process without waiting for it.
    self._thread = threading.Thread(
      target=self._run, name='decoding', daemon=True
    )
    self._thread.start()

  def __len__(self) -> int:
    return len(self._waiting)

  @property
  def is_open(self) -> bool:
    """Whether it takes requests."""
    return self._open and self._thread.is_alive()

  def submit(self, requests: list[Request]) -> None:
    """Takes requests, all or none.

    Raises:
      BusyError: the queue is full.
      DrainingError: it takes no more.
    """
    with self._changed:
      if not self.is_open:
        raise DrainingError('the server is ending and takes no more requests')
      self._drop_late()
      if len(self._waiting) + len(requests) > self._max_queue:
        raise BusyError(
          f'{len(self._waiting)} requests are waiting, of at most'
          f' {self._max_queue}; try again later'
        )
      self._waiting += requests
      self._changed.notify()

  def close(self) -> None:
    """Takes no more requests, and returns when those that wait are served."""
    with self._changed:
      self._open = False
      self._changed.notify()
    self._thread.join()

  def _run(self) -> None:
    while (batch := self._next()) is not None:
      # Those whose client has gone are not decoded.
      batch = [r for r in batch if r.future.set_running_or_notify_cancel()]
      if not batch:
        continue
      start = time.monotonic()
      self._decode(batch)
      try:
        self._watch(batch, time.monotonic() - start)
      except Exception:
        logging.exception('watching a batch failed')

  def _next(self) -> list[Request] | None:
    """Returns the next batch, when it is time; None at the end."""
    with self._changed:
      while True:
        self._drop_late()
        if not self._waiting:
          if not self._open:
            return None
          self._changed.wait()
          continue
        first = self._waiting[0]
        batch = [r for r in self._waiting if r.joins(first)][: self._max_batch]
        rest = first.arrived + self._max_wait - time.monotonic()
        if len(batch) == self._max_batch or rest <= 0 or not self._open:
          self._waiting = [r for r in self._waiting if r not in batch]
          return batch
        self._changed.wait(rest)

  def _drop_late(self) -> None:
    """Drops what nobody waits for any more."""
    now = time.monotonic()
    self._waiting = [r for r in self._waiting if not r.future.cancelled()]
    late = [r for r in self._waiting if r.deadline < now]
    self._waiting = [r for r in self._waiting if r.deadline >= now]
    for request in late:
      if request.future.set_running_or_notify_cancel():
        waited = now - request.arrived
        request.future.set_exception(
          DeadlineError(f'not begun within {waited:.3g} s, its deadline')
        )

  def _decode(self, batch: list[Request]) -> None:
    try:
      answers = self._model.decode([r.row for r in batch], batch[0].decoder)
    except Exception as e:
      if len(batch) == 1:
        batch[0].future.set_exception(e)
        return
      # Only whoever is to blame gets no answer.
      for request in batch:
        self._decode([request])
      return
    for request, answer in zip(batch, answers, strict=True):
      request.future.set_result(answer)
