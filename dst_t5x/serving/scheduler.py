"""The queue of requests, and the forming of batches.

The oldest request is always served next, so none waits forever.

Where the model's rows can join a running batch, requests join it between two
steps, in the order in which they arrived, and leave it with their last token.
If the oldest one that waits cannot be in one batch with those that are decoded,
nobody joins any more, and it begins when they have their answers.

Else, and for a beam search, batches are decoded as a whole. Requests with the
same subset join the batch of the oldest one. Requests with other subsets join
if both can be mixed. A batch that is not full waits until its oldest request
has waited for `max_wait` seconds.
"""

from collections.abc import Callable, Iterable
import functools
import itertools
import threading
import time

from absl import logging
import numpy as np

from dst_t5x.core.errors import UserError
from dst_t5x.serving import model as model_lib
from dst_t5x.serving import requests as requests_lib
from dst_t5x.serving import running as running_lib
from dst_t5x.serving import stepping
from dst_t5x.serving.requests import Request


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
      watch: called with each decoded batch, or each step of one that is decoded
        token by token, and the seconds that it took.
    """
    self._model = model
    self._max_queue = max_queue
    self._max_batch = max_batch
    self._max_wait = max_wait
    self._watch = watch or (lambda batch, seconds: None)
    running = running_lib.make(model, max_batch)
    self._stepper = None if running is None else stepping.Stepper(running)
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
  def has_steps(self) -> bool:
    """Whether the model decodes token by token."""
    return self._stepper is not None

  @property
  def is_open(self) -> bool:
    """Whether the scheduler takes requests."""
    return self._open and self._thread.is_alive()

  def submit(self, requests: list[Request]) -> None:
    """Puts requests into the queue, all or none.

    Raises:
      requests.BusyError: the queue is full.
      requests.DrainingError: the scheduler was closed.
    """
    with self._changed:
      if not self.is_open:
        raise requests_lib.DrainingError(
          'the server is ending and takes no more requests'
        )
      self._drop_late()
      if len(self._waiting) + len(requests) > self._max_queue:
        raise requests_lib.BusyError(
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
      batch = [r for r in batch if r.begin()]
      if batch and not self._has_steps(batch[0]):
        self._timed(batch, functools.partial(self._decode, batch))
      elif batch:
        self._join(batch)
      if self._stepper:
        self._timed(self._stepper.requests, self._step)

  def _timed(self, batch: list[Request], work: Callable[[], None]) -> None:
    start = time.monotonic()
    work()
    try:
      self._watch(batch, time.monotonic() - start)
    except Exception:
      logging.exception('watching a batch failed')

  def _has_steps(self, request: Request) -> bool:
    """Returns whether a request is decoded token by token."""
    return self._stepper is not None and request.steps

  def _next(self) -> list[Request] | None:
    """Waits for the next batch and returns it; None after `close`.

    While others are decoded token by token, it does not wait, and returns those
    that join them.
    """
    with self._changed:
      while True:
        self._drop_late()
        if self._stepper:
          return self._taken(self._joining())
        if not self._waiting:
          if not self._open:
            return None
          self._changed.wait()
          continue
        first = self._waiting[0]
        batch = [r for r in self._waiting if self._are_one_batch(first, r)]
        batch = batch[: self._max_batch]
        rest = first.arrived + self._max_wait - time.monotonic()
        if (
          self._has_steps(first)  # Others can join it later.
          or len(batch) == self._max_batch
          or rest <= 0
          or not self._open
        ):
          return self._taken(batch)
        self._changed.wait(rest)

  def _are_one_batch(self, first: Request, other: Request) -> bool:
    steps = self._has_steps(first)
    is_like = (
      self._has_steps(other) if steps else first.decoder == other.decoder
    )
    return is_like and other.joins(first)

  def _joining(self) -> Iterable[Request]:
    """Returns the requests that join those that are being decoded."""
    assert self._stepper is not None
    first, room = self._stepper.requests[0], self._stepper.room
    # Not those behind one that cannot: it would wait forever.
    return itertools.islice(
      itertools.takewhile(
        lambda r: self._are_one_batch(first, r), self._waiting
      ),
      room,
    )

  def _taken(self, requests: Iterable[Request]) -> list[Request]:
    """Takes requests from the queue, and returns them."""
    batch = list(requests)
    self._waiting = [r for r in self._waiting if r not in batch]
    return batch

  def _join(self, batch: list[Request]) -> None:
    """Begins requests that are decoded token by token."""
    assert self._stepper is not None
    batch = [r for r in batch if not self._is_empty(r)]
    try:
      later = self._stepper.join(batch)
    except UserError as e:
      if len(batch) == 1:
        batch[0].fail(e)
        return
      # One by one, so that only the request that fails gets no answer.
      for request in batch:
        self._join([request])
    except Exception as e:
      self._give_up([*self._stepper.give_up(), *batch], e)
    else:
      for request in later:
        request.mixes = False
      self._put_back(later)

  def _is_empty(self, request: Request) -> bool:
    """Answers a request without any token, which is not continued."""
    if self._model.prompt_size(request.row):
      return False
    request.future.set_result(model_lib.Answer(np.zeros(0, np.int32), 0.0))
    return True

  def _step(self) -> None:
    assert self._stepper is not None
    try:
      self._stepper.step()
    except Exception as e:
      self._give_up(self._stepper.give_up(), e)

  def _give_up(self, requests: list[Request], error: Exception) -> None:
    """Has requests decoded alone, after a failure; or fails the only one."""
    if len(requests) == 1:
      requests[0].fail(error)
      return
    for request in requests:
      request.is_alone = True
    self._put_back(requests)

  def _put_back(self, requests: list[Request]) -> None:
    with self._changed:
      self._waiting = [*requests, *self._waiting]

  def _drop_late(self) -> None:
    """Removes cancelled requests and those past their deadline."""
    now = time.monotonic()
    self._waiting = [r for r in self._waiting if not r.is_stopped]
    late = [r for r in self._waiting if r.deadline < now]
    self._waiting = [r for r in self._waiting if r.deadline >= now]
    for request in late:
      waited = now - request.arrived
      request.fail(
        requests_lib.DeadlineError(
          f'not begun within {waited:.3g} s, its deadline'
        )
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
