"""The answers of OpenAI's interface, as JSON."""

from collections.abc import Callable, Sequence
import dataclasses
import time
from typing import Any
import uuid

from dst_t5x.serving import running as running_lib
from dst_t5x.serving import streams

# JSON has no infinity; this is OpenAI's value for it.
_LEAST = -9999.0


def usage(prompt_tokens: int, tokens: int) -> dict[str, int]:
  """Returns the numbers of tokens."""
  return {
    'prompt_tokens': prompt_tokens,
    'completion_tokens': tokens,
    'total_tokens': prompt_tokens + tokens,
  }


@dataclasses.dataclass
class Body:
  """The bodies of the answer to one request.

  Attributes:
    model: the name that the request has.
    is_chat: whether it is of a chat.
    logprobs: how many of the most probable tokens are shown; None for no
      log-probabilities at all.
    piece: returns the text of a token.
  """

  model: str
  is_chat: bool
  logprobs: int | None
  piece: Callable[[int], str]

  def __post_init__(self) -> None:
    """Chooses an id."""
    self._created = int(time.time())
    kind = 'chatcmpl' if self.is_chat else 'cmpl'
    self._id = f'{kind}-{uuid.uuid4().hex}'

  def whole(
    self, pieces: Sequence[streams.Piece], count: int, usage: dict[str, int]
  ) -> dict[str, Any]:
    """Returns the body of answers that are sent at once.

    Args:
      pieces: of all answers.
      count: the number of answers.
      usage: see the function.
    """
    choices = []
    for number in range(count):
      own = [piece for piece in pieces if piece.number == number]
      text = ''.join(piece.text for piece in own)
      says = {'role': 'assistant', 'content': text, 'refusal': None}
      said = {'message': says} if self.is_chat else {'text': text}
      choices.append(self._choice(number, said, own))
    kind = 'chat.completion' if self.is_chat else 'text_completion'
    return {**self._head(kind), 'choices': choices, 'usage': usage}

  def chunk(self, piece: streams.Piece) -> dict[str, Any]:
    """Returns the body of a piece in a stream."""
    delta = {'content': piece.text} if piece.text or not piece.finish else {}
    said: dict[str, Any] = {'text': piece.text}
    if self.is_chat:
      said = {'delta': delta}
    return self._chunk([self._choice(piece.number, said, [piece])])

  def begin(self) -> dict[str, Any]:
    """Returns the first body of a chat in a stream."""
    delta = {'role': 'assistant', 'content': ''}
    return self._chunk([self._choice(0, {'delta': delta}, [])])

  def end(self, usage: dict[str, int]) -> dict[str, Any]:
    """Returns the body of a stream's usage."""
    return {**self._chunk([]), 'usage': usage}

  def _head(self, kind: str) -> dict[str, Any]:
    return {
      'id': self._id,
      'object': kind,
      'created': self._created,
      'model': self.model,
    }

  def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
    kind = 'chat.completion.chunk' if self.is_chat else 'text_completion'
    return {**self._head(kind), 'choices': choices}

  def _choice(
    self, number: int, said: dict[str, Any], pieces: Sequence[streams.Piece]
  ) -> dict[str, Any]:
    known = [piece for piece in pieces if piece.token is not None]
    logprobs = None
    if self.logprobs is not None and known:
      make = self._of_chat if self.is_chat else self._of_completion
      logprobs = make(known)
    finish = pieces[-1].finish if pieces else None
    return {
      'index': number,
      **said,
      'logprobs': logprobs,
      'finish_reason': finish,
    }

  def _best(self, token: running_lib.Token) -> list[tuple[str, float]]:
    return [
      (self.piece(number), max(logprob, _LEAST))
      for number, logprob in token.alternatives[: self.logprobs]
    ]

  def _of_completion(self, pieces: Sequence[streams.Piece]) -> dict[str, Any]:
    tokens = [piece.token for piece in pieces if piece.token is not None]
    return {
      'tokens': [self.piece(token.id) for token in tokens],
      'token_logprobs': [token.logprob for token in tokens],
      'top_logprobs': [dict(self._best(token)) for token in tokens],
      'text_offset': [piece.offset for piece in pieces],
    }

  def _of_chat(self, pieces: Sequence[streams.Piece]) -> dict[str, Any]:
    tokens = [piece.token for piece in pieces if piece.token is not None]
    content = [
      {
        **_entry(self.piece(token.id), token.logprob),
        'top_logprobs': [_entry(*best) for best in self._best(token)],
      }
      for token in tokens
    ]
    return {'content': content, 'refusal': None}


def _entry(text: str, logprob: float) -> dict[str, Any]:
  """Returns a token; its bytes are unknown if they are no whole text."""
  is_whole = bool(text) and '\ufffd' not in text
  found = list(text.encode()) if is_whole else None
  return {'token': text, 'logprob': logprob, 'bytes': found}
