"""The server's work, independent of HTTP."""

import asyncio
from collections.abc import Sequence
import dataclasses
import math
import time
from typing import Any

import anyio.to_thread

from dst_t5x.core.errors import UserError
from dst_t5x.models import decoding
from dst_t5x.serving import facts as facts_lib
from dst_t5x.serving import library as library_lib
from dst_t5x.serving import metrics as metrics_lib
from dst_t5x.serving import model as model_lib
from dst_t5x.serving import scheduler as scheduler_lib
from dst_t5x.serving import texts as texts_lib

MOST_INPUTS = 64


@dataclasses.dataclass(frozen=True)
class Output:
  """The answer to one input.

  Attributes:
    text: the decoded text.
    tokens: the number of decoded tokens, with the end token.
    score: the decoder's score.
  """

  text: str
  tokens: int
  score: float


@dataclasses.dataclass(frozen=True)
class Options:
  """The settings of a service.

  Attributes:
    beams: the number of beams of the decoder `beam`.
    deadline: seconds until a request is given up; the default and the maximum.
    max_queue: the most inputs that wait.
    max_batch: the most inputs in a batch.
    max_wait: seconds that an input waits for others to join its batch.
  """

  beams: int = 4
  deadline: float = 60.0
  max_queue: int = 256
  max_batch: int = 16
  max_wait: float = 0.002


class Service:
  """A model, its subsets and its queue."""

  def __init__(
    self,
    model: model_lib.MultiSubsetModel,
    library: library_lib.Library,
    texts: texts_lib.Texts,
    options: Options = Options(),
  ) -> None:
    """Starts the decoding thread; no other thread may use the model."""
    self.library = library
    self.options = options
    self.metrics = metrics_lib.Metrics(model, library)
    self.fingerprint = model.layout.fingerprint
    self.parameters = model.layout.size
    self._most_mixed = model.most_mixed
    self._texts = texts
    self.scheduler = scheduler_lib.Scheduler(
      model,
      max_queue=options.max_queue,
      max_batch=options.max_batch,
      max_wait=options.max_wait,
      watch=self.metrics.watch,
    )
    self.metrics.queue(self.scheduler)
    self._decoders: dict[str, model_lib.Decoder] = {
      'greedy': model_lib.GREEDY,
      'sample': model_lib.SAMPLING,
      'beam': decoding.BeamSearch(num_beams=options.beams),
    }

  async def generate(
    self,
    inputs: Sequence[str],
    subset: str | None,
    sent: bytes | None,
    decoder: str,
    deadline: float | None,
    sampling: decoding.Sampling = model_lib.SAMPLING,
  ) -> tuple[list[Output], str | None]:
    """Decodes inputs with one subset.

    Args:
      inputs: texts.
      subset: the subset's name; None for the seed.
      sent: the content of a subset file, instead of a name.
      decoder: 'greedy', 'beam' or 'sample'.
      deadline: seconds; None for the service's own.
      sampling: how 'sample' draws tokens.

    Returns:
      The answers, and the subset's name.

    Raises:
      UserError: the subset or an input cannot be used, or the logits are not
        finite. Its subclass tells the kinds apart: `NotFoundError`,
        `TooLargeError`, `BusyError`, `DrainingError` and `DeadlineError`.
    """
    until = time.monotonic() + min(
      deadline or self.options.deadline, self.options.deadline
    )
    # Looked up once: all inputs use the same subset, even if its file is
    # replaced meanwhile.
    known = await anyio.to_thread.run_sync(self._find, subset, sent)
    if sent is not None and known is not None:
      subset = library_lib.SENT_PREFIX + known.facts.digest
    rows = await anyio.to_thread.run_sync(self._rows, inputs, known, sampling)
    size = 0 if known is None else known.facts.size
    requests = [
      scheduler_lib.Request(
        row, self._decoders[decoder], size <= self._most_mixed, until
      )
      for row in rows
    ]
    self.scheduler.submit(requests)
    answers = await _gathered(requests, until)
    if not all(math.isfinite(answer.score) for answer in answers):
      raise UserError(
        f'subset {subset!r} makes logits that are not finite: its values are'
        ' too large for the model'
      )
    return [self._output(answer) for answer in answers], subset

  def _find(
    self, subset: str | None, sent: bytes | None
  ) -> library_lib.Known | None:
    if sent is not None:
      return self.library.send(sent)
    return None if subset is None else self.library.find(subset)

  def _rows(
    self,
    inputs: Sequence[str],
    known: library_lib.Known | None,
    sampling: decoding.Sampling,
  ) -> list[model_lib.Row]:
    make = model_lib.Row if known is None else known.row
    return [
      make(self._texts.encode(text))._replace(sampling=sampling, number=i)
      for i, text in enumerate(inputs)
    ]

  def _output(self, answer: model_lib.Answer) -> Output:
    text = self._texts.decode(answer.tokens)
    return Output(text, len(answer.tokens), answer.score)

  def describe(self, name: str, facts: facts_lib.Facts) -> dict[str, Any]:
    """Returns a description of a subset, as JSON."""
    return {
      'name': name,
      'bytes': facts.file_bytes,
      'size': facts.size,
      'share': facts.size / self.parameters,
      'about': facts.about,
    }


async def _gathered(
  requests: list[scheduler_lib.Request], until: float
) -> list[model_lib.Answer]:
  """Returns all answers.

  Raises:
    DeadlineError: not all came in time; the others are cancelled.
  """
  all_of_them = asyncio.gather(
    *(asyncio.wrap_future(request.future) for request in requests)
  )
  try:
    return await asyncio.wait_for(all_of_them, until - time.monotonic())
  except TimeoutError as e:
    raise scheduler_lib.DeadlineError(
      'no answer within the deadline of the request'
    ) from e
  finally:
    for request in requests:
      request.future.cancel()
