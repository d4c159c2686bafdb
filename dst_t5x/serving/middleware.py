"""What all ASGI middleware of the server shares."""

from starlette import types


class OnHttp:
  """ASGI middleware for HTTP; all else goes to the application as it is."""

  def __init__(self, app: types.ASGIApp) -> None:
    """Wraps an application."""
    self._app = app

  async def __call__(
    self, scope: types.Scope, receive: types.Receive, send: types.Send
  ) -> None:
    """Passes a request to `answer`, if it is one of HTTP."""
    answer = self.answer if scope['type'] == 'http' else self._app
    await answer(scope, receive, send)

  async def answer(
    self, scope: types.Scope, receive: types.Receive, send: types.Send
  ) -> None:
    """Answers a request of HTTP; a subclass says how."""
    raise NotImplementedError
