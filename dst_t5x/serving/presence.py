"""ASGI middleware that cancels, counts and refuses requests."""

import asyncio
from collections.abc import Callable, Collection
import urllib.parse

from absl import logging
import anyio
from starlette import types

from dst_t5x.serving import middleware
from dst_t5x.serving import refusals

GONE = 499  # nginx's status for a client that closed the connection.


class WhilePresent(middleware.OnHttp):
  """ASGI middleware: cancels the application when the client disconnects.

  This holds while the request is sent and while its answer is awaited. Work in
  a thread runs to its end.
  """

  async def answer(
    self, scope: types.Scope, receive: types.Receive, send: types.Send
  ) -> None:
    """Answers, unless the client disconnects."""
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
  """ASGI middleware: reports each request's status, 500 if it failed."""

  def __init__(
    self, app: types.ASGIApp, note: Callable[[str, int], None]
  ) -> None:
    """Wraps an application; calls `note` with a request's route and status."""
    super().__init__(app)
    self._note = note

  async def answer(
    self, scope: types.Scope, receive: types.Receive, send: types.Send
  ) -> None:
    """Answers as the application does; 500 if it raised before it answered."""
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
        failed = refusals.response(scope, 500, text)
        await failed(scope, receive, noting)
    finally:
      route = getattr(scope.get('route'), 'path', 'none')
      self._note(route, status or GONE)


class OnlyHosts(middleware.OnHttp):
  """ASGI middleware: refuses requests that name another host."""

  def __init__(self, app: types.ASGIApp, hosts: Collection[str]) -> None:
    """Wraps an application; `hosts` are names and addresses without ports."""
    super().__init__(app)
    self._hosts = frozenset(hosts)

  async def answer(
    self, scope: types.Scope, receive: types.Receive, send: types.Send
  ) -> None:
    """Answers 400 if the request names another host."""
    if _host(scope) not in self._hosts:
      text = 'the request names another host than this server: use the address'
      text += ' that it prints when it starts'
      response = refusals.response(scope, 400, text)
      await response(scope, receive, send)
      return
    await self._app(scope, receive, send)


def _host(scope: types.Scope) -> str | None:
  """Returns a request's host without port; None if it names none or several."""
  named = [value for name, value in scope['headers'] if name == b'host']
  if len(named) != 1:
    return None
  try:
    return urllib.parse.urlsplit(f'//{named[0].decode("latin-1")}').hostname
  except ValueError:
    return None
