"""The server's work, independent of HTTP."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
import contextlib
import dataclasses
import math
import time
from typing import Any

import anyio.to_thread
import numpy as np

from dst_t5x.core.errors import UserError
from dst_t5x.models import decoding
from dst_t5x.serving import facts as facts_lib
from dst_t5x.serving import library as library_lib
from dst_t5x.serving import metrics as metrics_lib
from dst_t5x.serving import model as model_lib
from dst_t5x.serving import refusals
from dst_t5x.serving import requests as requests_lib
from dst_t5x.serving import scheduler as scheduler_lib
from dst_t5x.serving import streams
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
    name: of the seed, as a model of `/v1`.
  """

  beams: int = 4
  deadline: float = 60.0
  max_queue: int = 256
  max_batch: int = 16
  max_wait: float = 0.002
  name: str = 'seed'


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
    self.name = options.name
    self.most_tokens = model.max_decode_length
    self.begin_id = model.network.begin_id
    self.texts = texts
    self._model = model
    self._ends = frozenset([model.network.eos_id])
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
      requests_lib.Request(
        row,
        self._decoders[decoder],
        size <= self._most_mixed,
        until,
        self.most_tokens,
        self._ends,
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

  def ends(self, texts: texts_lib.Texts) -> frozenset[int]:
    """Returns the tokens that end an answer: the model's, and a turn's."""
    return self._ends.union([] if texts.eos_id is None else [texts.eos_id])

  async def stream(
    self,
    name: str,
    encode: Callable[[], list[np.ndarray]],
    texts: texts_lib.Texts,
    settings: streams.Settings,
  ) -> tuple[streams.Stream, int]:
    """Begins to decode prompts with one subset, token by token.

    Args:
      name: of the subset, or of the base.
      encode: returns the prompts, each int32 [length]; called in a thread.
      texts: what decodes the answers.
      settings: how to decode.

    Returns:
      The answers, and the number of tokens of all prompts.

    Raises:
      UserError: as `generate`; or `settings.limit` is too large.
    """
    if settings.limit > self.most_tokens:
      raise refusals.ParameterError(
        'max_tokens',
        f'max_tokens is {settings.limit}, more than the {self.most_tokens} that'
        f' this server decodes: lower it, or start the server with'
        f' --output-length={settings.limit}',
      )
    until = time.monotonic() + self.options.deadline
    with naming_model():
      subset = None if name == self.name else name
      known = await anyio.to_thread.run_sync(self._find, subset, None)
    inputs = await anyio.to_thread.run_sync(encode)
    sampling = settings.sampling or model_lib.SAMPLING
    make = model_lib.Row if known is None else known.row
    rows = [
      make(tokens)._replace(sampling=sampling, number=i)
      for i, tokens in enumerate(inputs)
    ]
    size = 0 if known is None else known.facts.size
    stream = streams.Stream(
      rows, size <= self._most_mixed, texts, settings, until
    )
    self.scheduler.submit(stream.requests)
    return stream, sum(self._model.prompt_size(row) for row in rows)

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
      make(self.texts.encode(text))._replace(sampling=sampling, number=i)
      for i, text in enumerate(inputs)
    ]

  def _output(self, answer: model_lib.Answer) -> Output:
    text = self.texts.decode(answer.tokens)
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


@contextlib.contextmanager
def naming_model() -> Iterator[None]:
  """Says of an unknown subset that it is the `model` of the request."""
  try:
    yield
  except library_lib.NotFoundError as e:
    raise refusals.ModelNotFoundError(f'{e}; GET /v1/models lists all') from e


async def _gathered(
  requests: list[requests_lib.Request], until: float
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
    raise requests_lib.DeadlineError(
      'no answer within the deadline of the request'
    ) from e
  finally:
    for request in requests:
      request.stop()
