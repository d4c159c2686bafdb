"""The queue of requests, and the forming of batches.

The oldest request is always served next, so none waits forever. Requests with
the same subset join its batch. Requests with other subsets join if both can be
mixed. A batch that is not full waits until its oldest request has waited for
`max_wait` seconds.
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
    decoder: greedy or beam search.
    mixes: whether it can be in one batch with other subsets.
    deadline: the latest time.monotonic() at which decoding may begin.
    future: receives the answer.
    arrived: time.monotonic() when the request was made.
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
    """Returns whether it can be in one batch with `first`."""
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
      model: the model; no other thread may use it from now on.
      max_queue: the most requests that wait.
      max_batch: the most requests in a batch.
      max_wait: seconds that a request waits for others to join its batch.
      watch: called with each decoded batch and the seconds that it took.
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
    """Whether the scheduler takes requests."""
    return self._open and self._thread.is_alive()

  def submit(self, requests: list[Request]) -> None:
    """Puts requests into the queue, all or none.

    Raises:
      BusyError: the queue is full.
      DrainingError: the scheduler was closed.
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
    """Refuses new requests, and returns when all waiting ones are served."""
    with self._changed:
      self._open = False
      self._changed.notify()
    self._thread.join()

  def _run(self) -> None:
    while (batch := self._next()) is not None:
      # Requests whose client disconnected are not decoded.
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
    """Waits for the next batch and returns it; None after `close`."""
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
    """Removes cancelled requests and those past their deadline."""
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
      # One by one, so that only the request that fails gets no answer.
      for request in batch:
        self._decode([request])
      return
    for request, answer in zip(batch, answers, strict=True):
      request.future.set_result(answer)
