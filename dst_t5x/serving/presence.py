"""What becomes of a request: its client may go, or mean another server."""

import asyncio
from collections.abc import Callable, Collection
import urllib.parse

from absl import logging
import anyio
from starlette import responses
from starlette import types

from dst_t5x.serving import middleware

GONE = 499  # nginx's status for a client that has gone; nobody receives it.


class WhilePresent(middleware.OnHttp):
  """ASGI middleware: no work is done for a client that has gone.

  The application is cancelled, whether the request was cut short or its client
  does not wait for the answer any more. What runs in a thread goes on to its
  end.
  """

  async def answer(
    self, scope: types.Scope, receive: types.Receive, send: types.Send
  ) -> None:
    """Answers, or answers nothing if the client has gone."""
    watching: list[asyncio.Task[None]] = []
    with anyio.CancelScope() as work:

      async def watch() -> None:
        while (await receive())['type'] != 'http.disconnect':
          pass
        work.cancel()

      async def watched() -> types.Message:
        if watching:  # The request is complete.
          await anyio.sleep_forever()
        message = await receive()
        if message['type'] == 'http.disconnect':
          work.cancel()
          await anyio.sleep_forever()
        if not message.get('more_body'):
          watching.append(asyncio.create_task(watch()))
        return message

      try:
        await self._app(scope, watched, send)
      finally:
        for task in watching:
          task.cancel()


class Counted(middleware.OnHttp):
  """ASGI middleware: says how each request ended; 500 if it failed."""

  def __init__(
    self, app: types.ASGIApp, note: Callable[[str, int], None]
  ) -> None:
    """Wraps an application; `note` gets a route and a status."""
    super().__init__(app)
    self._note = note

  async def answer(
    self, scope: types.Scope, receive: types.Receive, send: types.Send
  ) -> None:
    """Answers as the application does, if that does."""
    status = None

    async def noting(message: types.Message) -> None:
      nonlocal status
      if message['type'] == 'http.response.start':
        status = message['status']
      await send(message)

    try:
      await self._app(scope, receive, noting)
    except Exception:
      logging.exception('a request failed')
      if status is None:
        text = 'the server failed; its log says more'
        await responses.JSONResponse({'error': text}, 500)(
          scope, receive, noting
        )
    finally:
      route = getattr(scope.get('route'), 'path', 'none')
      self._note(route, status or GONE)


class OnlyHosts(middleware.OnHttp):
  """ASGI middleware: requests that name another host are refused."""

  def __init__(self, app: types.ASGIApp, hosts: Collection[str]) -> None:
    """Wraps an application; `hosts` are names and addresses, no ports."""
    super().__init__(app)
    self._hosts = frozenset(hosts)

  async def answer(
    self, scope: types.Scope, receive: types.Receive, send: types.Send
  ) -> None:
    """Answers 400 instead of the application, if it must."""
    if _host(scope) not in self._hosts:
      text = 'the request names another host than this server: use the address'
      response = responses.JSONResponse(
        {'error': f'{text} that it prints when it starts'}, 400
      )
      await response(scope, receive, send)
      return
    await self._app(scope, receive, send)


def _host(scope: types.Scope) -> str | None:
  """Returns the host of a request without its port; None if there is none."""
  named = [value for name, value in scope['headers'] if name == b'host']
  if len(named) != 1:
    return None
  try:
    return urllib.parse.urlsplit(f'//{named[0].decode("latin-1")}').hostname
  except ValueError:
    return None
