"""The server's HTTP interface; `/openapi.json` describes it."""

from collections.abc import AsyncIterator, Callable
import contextlib
import dataclasses
import pathlib
import secrets
import time
from typing import Annotated, Any, Literal

import anyio.to_thread
import fastapi
from fastapi import exceptions
from fastapi import responses
from fastapi import security
import pydantic
from starlette import exceptions as http_exceptions

import dst_t5x
from dst_t5x.core.errors import UserError
from dst_t5x.models import decoding
from dst_t5x.serving import library as library_lib
from dst_t5x.serving import openai_routes
from dst_t5x.serving import presence
from dst_t5x.serving import refusals
from dst_t5x.serving import service as service_lib
from dst_t5x.serving import statuses
from dst_t5x.serving import uploads

PAGE = pathlib.Path(__file__).parent / 'page.html'
# The page loads nothing else, and connects to this server only.
_POLICY = (
  "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline';"
  " connect-src 'self'; img-src data:; frame-ancestors 'none'; base-uri 'none'"
)
_Name = Annotated[str, fastapi.Path(description='of the subset')]


_MOST_INT = 2**31 - 1
_SAMPLE = 'of the decoder `sample`'
_Temperature = Annotated[
  float, pydantic.Field(ge=1e-6, le=1e6, description=_SAMPLE)
]
_TopK = Annotated[int, pydantic.Field(ge=1, le=_MOST_INT, description=_SAMPLE)]
_TopP = Annotated[float, pydantic.Field(gt=0, le=1, description=_SAMPLE)]
_RandomSeed = Annotated[
  int, pydantic.Field(ge=0, le=_MOST_INT, description=_SAMPLE)
]


class Error(pydantic.BaseModel):
  """What went wrong, and how to fix it."""

  error: str


class GenerateRequest(pydantic.BaseModel):
  """Inputs, and a subset by name or as a file; without either, the seed."""

  model_config = pydantic.ConfigDict(extra='forbid')

  inputs: Annotated[
    list[str],
    pydantic.Field(
      min_length=1,
      max_length=service_lib.MOST_INPUTS,
      description="as the task's preprocessing makes them",
    ),
  ]
  subset: str | None = pydantic.Field(
    None, description='a name; the seed alone by default'
  )
  subset_file: pydantic.Base64Bytes | None = pydantic.Field(
    None, description='a `.dst` file in Base64, instead of a name'
  )
  decoder: Literal['greedy', 'beam', 'sample'] = 'greedy'
  temperature: _Temperature = 1.0
  top_k: _TopK | None = None
  top_p: _TopP = 1.0
  random_seed: _RandomSeed = 0
  deadline: float | None = pydantic.Field(
    None, gt=0, description='seconds; at most what the server allows'
  )

  def sampling(self) -> decoding.Sampling:
    """Returns how to draw.

    Raises:
      UserError: it is said for a decoder that does not.
    """
    names = [field.name for field in dataclasses.fields(decoding.Sampling)]
    given = [name for name in names if name in self.model_fields_set]
    if given and self.decoder != 'sample':
      raise UserError(
        f'{given[0]} has no effect on the decoder {self.decoder!r}: set'
        ' "decoder": "sample"'
      )
    return decoding.Sampling(**{name: getattr(self, name) for name in names})


class Output(pydantic.BaseModel):
  """The answer to one input."""

  text: str
  tokens: int
  score: float


class GenerateResponse(pydantic.BaseModel):
  """The answers, in the order of the inputs."""

  outputs: list[Output]
  subset: str | None = pydantic.Field(
    description='a file that was sent can be named so, for a while'
  )
  seconds: float


class Subset(pydantic.BaseModel):
  """A subset of the server."""

  name: str
  bytes: int
  size: int
  share: float
  about: dict[str, Any]


class Listing(pydantic.BaseModel):
  """All subsets with names; `damaged` maps the unusable ones to errors."""

  seed: str
  subsets: list[Subset]
  damaged: dict[str, str]


class Health(pydantic.BaseModel):
  """Whether the server takes requests."""

  status: Literal['ok', 'ending']
  version: str


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
  return {status: {'model': Error} for status in (401, *statuses)}


# For routes whose own answer is not JSON.
_JSON_ERROR = {
  'description': 'Unauthorized',
  'content': {
    'application/json': {'schema': {'$ref': '#/components/schemas/Error'}}
  },
}


def create_app(
  service: service_lib.Service,
  token: str | None = None,
  hosts: list[str] | None = None,
) -> fastapi.FastAPI:
  """Returns the application.

  Args:
    service: the service; closed when the application ends.
    token: the bearer token that clients must send; None for no check.
    hosts: the host names that requests may use; any if None.
  """

  @contextlib.asynccontextmanager
  async def ending(app: fastapi.FastAPI) -> AsyncIterator[None]:
    del app
    yield
    await anyio.to_thread.run_sync(service.scheduler.close)

  app = fastapi.FastAPI(
    title='dst_t5x',
    summary='One seed, many subsets',
    version=dst_t5x.__version__,
    docs_url=None,  # These pages load scripts from another site.
    redoc_url=None,
    lifespan=ending,
  )
  _handle_errors(app)
  _open_routes(app, service)
  guards = [fastapi.Depends(_guard(token))] if token else []
  guarded = fastapi.APIRouter(dependencies=guards)
  _generate_route(guarded, service)
  _subset_routes(guarded, service)
  openai_routes.add(guarded, service, _only_json)
  app.include_router(guarded)
  # Middleware that is added last sees a request first.
  app.add_middleware(presence.WhilePresent)
  # Base64 takes 4/3 of a file's bytes; 1 MiB is for the rest of the request.
  limit = service.library.limits.upload_bytes * 4 // 3 + 2**20
  app.add_middleware(uploads.BodyLimit, limit=limit)
  if hosts:
    app.add_middleware(presence.OnlyHosts, hosts=hosts)
  app.add_middleware(presence.Counted, note=service.metrics.note)
  return app


def _guard(token: str) -> Callable[..., None]:
  """Returns a dependency that refuses requests without the token."""
  bearer = security.HTTPBearer(auto_error=False)
  Given = Annotated[
    security.HTTPAuthorizationCredentials | None, fastapi.Depends(bearer)
  ]

  def check(given: Given) -> None:
    # Starlette decodes headers as Latin-1.
    shown = given.credentials.encode('latin-1') if given else b''
    if not secrets.compare_digest(shown, token.encode()):
      raise fastapi.HTTPException(
        401,
        'show the token: Authorization: Bearer …',
        {'WWW-Authenticate': 'Bearer'},
      )

  return check


def _only_json(request: fastapi.Request) -> None:
  """Refuses a request whose content type is not JSON.

  A page of another site can make a browser send such a request without a CORS
  preflight.
  """
  given = request.headers.get('content-type', '')
  kind = given.partition(';')[0].strip().lower()
  if kind != 'application/json':
    raise fastapi.HTTPException(
      415, 'send the header Content-Type: application/json'
    )


def _handle_errors(app: fastapi.FastAPI) -> None:
  """Makes every error one line of JSON."""

  @app.exception_handler(UserError)
  async def user(request: fastapi.Request, e: UserError) -> fastapi.Response:
    status = statuses.of(e)
    retry = {'Retry-After': '1'} if status in (429, 503) else None
    text = str(e).removeprefix('subset: ')
    return refusals.response(request.scope, status, text, retry, e)

  @app.exception_handler(exceptions.RequestValidationError)
  async def invalid(
    request: fastapi.Request, e: exceptions.RequestValidationError
  ) -> fastapi.Response:
    first = e.errors()[0]
    where = '.'.join(str(part) for part in first['loc'] if part != 'body')
    text = f'{where or "the request"}: {first["msg"]}'
    error = refusals.ParameterError(where, text) if where else None
    return refusals.response(request.scope, 422, text, error=error)

  @app.exception_handler(http_exceptions.HTTPException)
  async def known(
    request: fastapi.Request, e: http_exceptions.HTTPException
  ) -> fastapi.Response:
    text = str(e.detail)
    if e.status_code == 404 and refusals.is_openai(request.scope):
      text = f'there is no {request.url.path}: {openai_routes.PATHS}'
    return refusals.response(request.scope, e.status_code, text, e.headers)


def _open_routes(app: fastapi.FastAPI, service: service_lib.Service) -> None:
  """Adds the routes that need no token; they tell nothing about subsets."""

  @app.get('/', response_class=responses.HTMLResponse, include_in_schema=False)
  def page() -> responses.HTMLResponse:
    return responses.HTMLResponse(
      PAGE.read_text(encoding='utf-8'),
      headers={'Content-Security-Policy': _POLICY},
    )

  @app.get('/health', responses={503: {'model': Health}})
  def health(response: fastapi.Response) -> Health:
    """Returns whether the server takes requests."""
    is_open = service.scheduler.is_open
    response.status_code = 200 if is_open else 503
    status: Literal['ok', 'ending'] = 'ok' if is_open else 'ending'
    return Health(status=status, version=dst_t5x.__version__)


def _generate_route(
  router: fastapi.APIRouter, service: service_lib.Service
) -> None:
  """Adds the routes for decoding and for metrics."""

  @router.post(
    '/generate',
    dependencies=[fastapi.Depends(_only_json)],
    responses=_errors(400, 404, 413, 415, 422, 429, 503, 504),
  )
  async def generate(request: GenerateRequest) -> GenerateResponse:
    """Decodes each input with the subset, as if it were alone."""
    if request.subset is not None and request.subset_file is not None:
      raise UserError('give subset or subset_file, not both')
    start = time.perf_counter()
    outputs, name = await service.generate(
      request.inputs,
      request.subset,
      request.subset_file,
      request.decoder,
      request.deadline,
      request.sampling(),
    )
    seconds = time.perf_counter() - start
    service.metrics.seconds.observe(seconds)
    found = [
      Output(text=o.text, tokens=o.tokens, score=o.score) for o in outputs
    ]
    return GenerateResponse(outputs=found, subset=name, seconds=seconds)

  @router.get(
    '/metrics',
    response_class=responses.PlainTextResponse,
    responses={401: _JSON_ERROR},
  )
  def metrics() -> fastapi.Response:
    """Returns counts and times for Prometheus."""
    return fastapi.Response(
      service.metrics.text(), media_type='text/plain; version=0.0.4'
    )


def _subset_routes(
  router: fastapi.APIRouter, service: service_lib.Service
) -> None:
  """Adds the routes that list, describe, add and delete subsets."""
  library = service.library

  @router.get('/subsets', responses=_errors())
  def list_subsets() -> Listing:
    """Lists the subsets with names."""
    found, damaged = [], {}
    for name in library.names():
      try:
        found.append(Subset(**service.describe(name, library.facts(name))))
      except library_lib.NotFoundError:
        continue  # Deleted meanwhile.
      except UserError as e:
        damaged[name] = str(e)
    return Listing(seed=service.fingerprint, subsets=found, damaged=damaged)

  @router.get('/subsets/{name}', responses=_errors(404, 413, 422))
  def get_subset(name: _Name) -> Subset:
    """Describes a subset."""
    return Subset(**service.describe(name, library.facts(name)))

  @router.put(
    '/subsets/{name}',
    status_code=201,
    responses=_errors(404, 413, 422, 507),
    openapi_extra=uploads.FILE_BODY,
  )
  async def put_subset(name: _Name, request: fastapi.Request) -> Subset:
    """Adds or replaces a subset; the body is a `.dst` file."""
    blob = await request.body()
    facts = await anyio.to_thread.run_sync(library.add, name, blob)
    return Subset(**service.describe(name, facts))

  @router.delete('/subsets/{name}', status_code=204, responses=_errors(404))
  def delete_subset(name: _Name) -> None:
    """Deletes a subset."""
    library.delete(name)
