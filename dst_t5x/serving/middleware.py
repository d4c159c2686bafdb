"""The base class of the server's ASGI middleware."""

from starlette import types


class OnHttp:
  """ASGI middleware for HTTP; other scopes pass through unchanged."""

  def __init__(self, app: types.ASGIApp) -> None:
    """Wraps an application."""
    self._app = app

  async def __call__(
    self, scope: types.Scope, receive: types.Receive, send: types.Send
  ) -> None:
    """Passes an HTTP request to `answer`, any other to the application."""
    answer = self.answer if scope['type'] == 'http' else self._app
    await answer(scope, receive, send)

  async def answer(
    self, scope: types.Scope, receive: types.Receive, send: types.Send
  ) -> None:
    """Answers an HTTP request; subclasses define how."""
    raise NotImplementedError
