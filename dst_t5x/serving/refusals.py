"""The bodies of the server's errors.

Most paths have `{"error": "one line"}`. Those under `/v1` have OpenAI's form,
with the same line.
"""

from collections.abc import Mapping
from typing import Any

from starlette import responses
from starlette import types

from dst_t5x.core.errors import UserError

OPENAI = '/v1'
_CODES = {
  401: 'invalid_api_key',
  404: 'not_found',
  413: 'request_too_large',
  429: 'rate_limit_exceeded',
  504: 'timeout',
}


class ParameterError(UserError):
  """A parameter of a request to `/v1` cannot be used.

  Attributes:
    parameter: its name.
    code: a word for programs; None for none.
  """

  def __init__(
    self, parameter: str, text: str, code: str | None = None
  ) -> None:
    """Takes the parameter's name and the line that is shown."""
    super().__init__(text)
    self.parameter = parameter
    self.code = code


class ModelNotFoundError(ParameterError):
  """There is no subset with the name of the model."""

  def __init__(self, text: str) -> None:
    """Takes the line that is shown."""
    super().__init__('model', text, 'model_not_found')


def is_openai(scope: types.Scope) -> bool:
  """Returns whether the path of a request is OpenAI's."""
  path = scope['path']
  return path == OPENAI or path.startswith(f'{OPENAI}/')


def one_line(text: str) -> str:
  """Returns a text from a request, surrogates and line breaks too, as a line.

  Args:
    text: any text.
  """
  return ' '.join(text.encode('utf-8', 'backslashreplace').decode().split())


def openai_error(
  status: int, text: str, parameter: str | None = None, code: str | None = None
) -> dict[str, Any]:
  """Returns an error in OpenAI's form."""
  kind = 'server_error' if status >= 500 else 'invalid_request_error'
  if status == 429:
    kind = 'rate_limit_error'
  return {
    'error': {
      'message': one_line(text),
      'type': kind,
      'param': parameter,
      'code': code or _CODES.get(status),
    }
  }


def response(
  scope: types.Scope,
  status: int,
  text: str,
  headers: Mapping[str, str] | None = None,
  error: Exception | None = None,
) -> responses.JSONResponse:
  """Returns an error in the form of the request's path.

  Args:
    scope: the request's.
    status: HTTP's.
    text: what went wrong, and the remedy.
    headers: more headers.
    error: a `ParameterError` has more to say.
  """
  content: dict[str, Any] = {'error': one_line(text)}
  if is_openai(scope):
    about: tuple[str | None, str | None] = None, None
    if isinstance(error, ParameterError):
      about = error.parameter, error.code
    # OpenAI's own server has no 422.
    status = 400 if status == 422 else status
    content = openai_error(status, text, *about)
  return responses.JSONResponse(content, status, headers)
