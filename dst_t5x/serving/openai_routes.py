"""OpenAI's interface: `/v1/models`, `/v1/completions`, `/v1/chat/completions`.

`model` is the name of a subset, or of the base. See docs/serving.md for the
options that there are.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
import contextlib
import time
from typing import Any

from absl import logging
import fastapi
from fastapi import responses
import numpy as np

from dst_t5x.core import json_text
from dst_t5x.core.errors import UserError
from dst_t5x.data import conversations
from dst_t5x.data import text_files
from dst_t5x.serving import openai_bodies
from dst_t5x.serving import openai_types
from dst_t5x.serving import refusals
from dst_t5x.serving import service as service_lib
from dst_t5x.serving import statuses
from dst_t5x.serving import streams
from dst_t5x.serving import texts as texts_lib

PATHS = 'use /v1/models, /v1/completions or /v1/chat/completions'
_ERRORS: dict[int | str, dict[str, Any]] = {
  status: {'model': openai_types.OpenAIError}
  for status in (400, 401, 404, 413, 415, 429, 503, 504)
}
# OpenAI's own default.
_COMPLETION_TOKENS = 16


def add(
  router: fastapi.APIRouter,
  service: service_lib.Service,
  only_json: Callable[[fastapi.Request], None],
) -> None:
  """Adds the routes.

  Args:
    router: gets the routes.
    service: decodes.
    only_json: refuses requests whose content type is not JSON.
  """

  def can_continue() -> None:
    if not service.scheduler.has_steps:
      raise UserError(
        '/v1 is for decoder-only models, which continue a prompt; this'
        " server's model does not: use POST /generate"
      )

  able = fastapi.Depends(can_continue)
  _model_routes(router, service, able)
  both = [able, fastapi.Depends(only_json)]

  @router.post(
    f'{refusals.OPENAI}/completions', dependencies=both, responses=_ERRORS
  )
  async def complete(request: openai_types.Completion) -> Any:
    """Continues prompts."""
    prompts, limit = request.prompts, request.max_tokens
    if limit is None:
      limit = min(_COMPLETION_TOKENS, service.most_tokens)
    texts = service.texts.plain

    def encode() -> list[np.ndarray]:
      return [_encoded(service, texts, prompt) for prompt in prompts]

    body = openai_bodies.Body(
      request.model, False, request.logprobs, texts.piece
    )
    return await _answer(service, request, body, texts, encode, limit)

  @router.post(
    f'{refusals.OPENAI}/chat/completions', dependencies=both, responses=_ERRORS
  )
  async def chat(request: openai_types.Chat) -> Any:
    """Answers the last message of a conversation."""
    limit = request.max_completion_tokens or request.max_tokens
    texts = _chat_texts(service)
    top = request.top_logprobs or 0 if request.logprobs else None
    body = openai_bodies.Body(request.model, True, top, texts.piece)
    return await _answer(
      service,
      request,
      body,
      texts,
      lambda: [texts.encode(_conversation(request.messages))],
      service.most_tokens if limit is None else limit,
    )


def _encoded(
  service: service_lib.Service, texts: texts_lib.Texts, prompt: str | list[int]
) -> np.ndarray:
  """Returns a prompt as a task's `inputs`, int32 [length]."""
  if isinstance(prompt, str):
    return texts.encode(prompt)
  # The network puts this token before every prompt.
  has_begin = prompt[0] == service.begin_id
  return texts.of_ids(prompt[1:] if has_begin else prompt)


def _model_routes(
  router: fastapi.APIRouter, service: service_lib.Service, able: Any
) -> None:
  created = int(time.time())

  def model(name: str) -> dict[str, Any]:
    about = {'object': 'model', 'created': created, 'owned_by': 'dst_t5x'}
    parent = None if name == service.name else service.name
    return {'id': name, **about, 'parent': parent}

  @router.get(
    f'{refusals.OPENAI}/models', dependencies=[able], responses=_ERRORS
  )
  def list_models() -> dict[str, Any]:
    """Lists the base and the subsets that can be used."""
    names = [service.name]
    for name in service.library.names():
      try:
        service.library.facts(name)
      except UserError:
        continue  # Damaged, or deleted meanwhile.
      names.append(name)
    return {'object': 'list', 'data': [model(name) for name in names]}

  @router.get(
    f'{refusals.OPENAI}/models/{{name:path}}',
    dependencies=[able],
    responses=_ERRORS,
  )
  def get_model(name: str) -> dict[str, Any]:
    """Describes the base or a subset."""
    with service_lib.naming_model():
      if name != service.name:
        service.library.facts(name)
    return model(name)


def _chat_texts(service: service_lib.Service) -> texts_lib.Texts:
  """Returns what makes a prompt of a conversation.

  Raises:
    UserError: the model has no chat template that fits.
  """
  try:
    texts = service.texts.chat
  except UserError as e:
    logging.warning('no chat: %s', e)
    raise UserError(
      'this model has no chat template that can be used: send the prompt to'
      ' /v1/completions'
    ) from e
  if texts.begin_id != service.begin_id:
    raise UserError(
      f'the chat template begins with token {texts.begin_id}, the model with'
      f' {service.begin_id}: send the prompt to /v1/completions'
    )
  return texts


def _conversation(messages: Sequence[openai_types.Message]) -> str:
  """Returns messages as a text for a chat vocabulary.

  Raises:
    ParameterError: a message cannot be used.
  """
  content = [message.as_dict(i) for i, message in enumerate(messages)]
  try:
    return conversations.to_text(conversations.check(content))
  except text_files.MalformedRow as e:
    text = f'the request {e}'
    raise refusals.ParameterError('messages', text) from e


async def _answer(
  service: service_lib.Service,
  request: openai_types.Request,
  body: openai_bodies.Body,
  texts: texts_lib.Texts,
  encode: Callable[[], list[np.ndarray]],
  limit: int,
) -> Any:
  """Returns the response to a request."""
  request.check()
  start = time.perf_counter()
  settings = streams.Settings(
    limit,
    service.ends(texts),
    request.sampling,
    request.stops,
    bool(body.logprobs),
  )
  stream, prompt_tokens = await service.stream(
    request.model, encode, texts, settings
  )

  def usage() -> dict[str, int]:
    service.metrics.seconds.observe(time.perf_counter() - start)
    return openai_bodies.usage(prompt_tokens, stream.tokens)

  pieces = stream.pieces()
  if not request.stream:
    found = [piece async for piece in pieces]
    return body.whole(found, len(stream.requests), usage())
  # Awaited, so that what goes wrong until then has its own status.
  first = await anext(pieces)
  events = _events(body, first, pieces, usage, request.has_usage)
  return responses.StreamingResponse(events, media_type='text/event-stream')


async def _events(
  body: openai_bodies.Body,
  first: streams.Piece,
  pieces: AsyncGenerator[streams.Piece, None],
  usage: Callable[[], dict[str, int]],
  has_usage: bool,
) -> AsyncIterator[str]:
  """Yields server-sent events."""
  try:
    async with contextlib.aclosing(pieces):
      if body.is_chat:
        yield _event(body.begin())
      yield _event(body.chunk(first))
      async for piece in pieces:
        if piece.text or piece.finish or body.logprobs is not None:
          yield _event(body.chunk(piece))
      total = usage()
      if has_usage:
        yield _event(body.end(total))
      yield 'data: [DONE]\n\n'
  except UserError as e:
    # The status has been sent.
    yield _event(refusals.openai_error(statuses.of(e), str(e)))


def _event(content: Any) -> str:
  return f'data: {json_text.dumps(content, ensure_ascii=False)}\n\n'
