"""Requests that are decoded together, a token at a time."""

from collections.abc import Sequence
import dataclasses

import numpy as np

from dst_t5x.core.errors import UserError
from dst_t5x.serving import model as model_lib
from dst_t5x.serving import requests as requests_lib
from dst_t5x.serving import running as running_lib


@dataclasses.dataclass
class _Progress:
  """A request and its tokens so far."""

  request: requests_lib.Request
  tokens: list[int] = dataclasses.field(default_factory=list)
  score: float = 0.0

  def add(self, token: running_lib.Token) -> bool:
    """Hands a token on; returns whether it was the last one."""
    self.tokens.append(token.id)
    self.score += token.logprob
    self.request.hand_on(len(self.tokens) - 1, token)
    return (
      token.id in self.request.ends or len(self.tokens) >= self.request.limit
    )

  @property
  def answer(self) -> model_lib.Answer:
    """The tokens so far."""
    return model_lib.Answer(np.array(self.tokens, np.int32), self.score)


class Stepper:
  """The requests of a running batch; used by the decoding thread only."""

  def __init__(self, running: running_lib.Running) -> None:
    """Takes an empty batch."""
    self._running = running
    self._slots: dict[int, _Progress] = {}

  def __len__(self) -> int:
    return len(self._slots)

  @property
  def requests(self) -> list[requests_lib.Request]:
    """Those that are being decoded."""
    return [progress.request for progress in self._slots.values()]

  @property
  def room(self) -> int:
    """How many requests can join."""
    return self._running.count - len(self)

  def join(
    self, requests: Sequence[requests_lib.Request]
  ) -> list[requests_lib.Request]:
    """Begins requests, all or none.

    Returns:
      Those whose subsets cannot be decoded together with the others.

    Raises:
      UserError: one cannot be decoded; the others are not affected.
      RuntimeError: those that were running are lost, too.
    """
    try:
      slots = self._running.join([r.ask for r in requests])
    except UserError as e:
      if len(self._running) < len(self):
        raise RuntimeError('the running rows were lost') from e
      raise
    later = []
    for slot, request in zip(slots, requests, strict=True):
      if slot is None:
        later.append(request)
      else:
        self._slots[slot] = _Progress(request)
    return later

  def step(self) -> None:
    """Decodes a token of each request, and answers those that end."""
    for slot, token in self._running.step().items():
      progress = self._slots[slot]
      is_last = progress.add(token)
      if is_last or progress.request.is_stopped:
        self._leave(slot)

  def _leave(self, slot: int) -> None:
    progress = self._slots.pop(slot)
    self._running.leave(slot)
    progress.request.future.set_result(progress.answer)

  def give_up(self) -> list[requests_lib.Request]:
    """Returns the requests after a failure; none is being decoded any more."""
    requests = self.requests
    self._slots.clear()
    self._running.clear()
    return requests
