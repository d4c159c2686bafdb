"""Limits the size of request bodies."""

from starlette import types

from dst_t5x.serving import middleware
from dst_t5x.serving import refusals

# OpenAPI's description of a binary request body.
FILE_BODY = {
  'requestBody': {
    'required': True,
    'content': {
      'application/octet-stream': {
        'schema': {'type': 'string', 'format': 'binary'}
      }
    },
  }
}


class BodyLimit(middleware.OnHttp):
  """ASGI middleware: refuses a body that is too long without reading it all."""

  def __init__(self, app: types.ASGIApp, limit: int) -> None:
    """Wraps an application; `limit` is in bytes."""
    super().__init__(app)
    self._limit = limit

  async def answer(
    self, scope: types.Scope, receive: types.Receive, send: types.Send
  ) -> None:
    """Answers 413 if the body is too long."""
    headers = dict(scope['headers'])
    length = headers.get(b'content-length', b'0')
    if length.isdigit() and int(length) > self._limit:
      await self._refuse(scope, receive, send)
      return
    read, too_long, started = 0, False, False

    async def counted() -> types.Message:
      nonlocal read, too_long
      message = await receive()
      read += len(message.get('body', b''))
      if read > self._limit:
        too_long = True
        # The application sees a client that disconnected.
        return {'type': 'http.disconnect'}
      return message

    async def guarded(message: types.Message) -> None:
      nonlocal started
      if not too_long or started:
        started = True
        await send(message)

    try:
      await self._app(scope, counted, guarded)
    except Exception:
      if not too_long:
        raise
    if too_long and not started:
      await self._refuse(scope, receive, send)

  async def _refuse(
    self, scope: types.Scope, receive: types.Receive, send: types.Send
  ) -> None:
    text = f'the request has more than {self._limit:,} bytes'
    response = refusals.response(scope, 413, text, {'Connection': 'close'})
    await response(scope, receive, send)
