"""Requests of OpenAI's interface, and which of their options there are.

An option that changes answers and does not exist here is refused by its name,
unless it has the value that changes nothing.
"""

from collections.abc import Sequence
from typing import Annotated, Any

import pydantic

from dst_t5x.models import decoding
from dst_t5x.serving import refusals
from dst_t5x.serving import service as service_lib
from dst_t5x.serving import steps

_MOST_INT = 2**31 - 1
_MOST_STOPS = 16
_Count = Annotated[int, pydantic.Field(ge=1, le=_MOST_INT)]
_Stop = Annotated[str, pydantic.Field(min_length=1, max_length=1000)]
_Ids = Annotated[list[int], pydantic.Field(min_length=1)]

# Option -> the values that change nothing; so does null.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
  'audio': (),
  'best_of': (1,),
  'echo': (False,),
  'frequency_penalty': (0,),
  'function_call': ('auto', 'none'),
  'functions': ([],),
  'logit_bias': ({},),
  'metadata': ({},),
  'modalities': (['text'],),
  'n': (1,),
  'parallel_tool_calls': (True, False),
  'prediction': (),
  'presence_penalty': (0,),
  'reasoning_effort': ('none',),
  'response_format': ({'type': 'text'},),
  'service_tier': ('auto', 'default'),
  'store': (False,),
  'suffix': ('',),
  'tool_choice': ('auto', 'none'),
  'tools': ([],),
}
_REMEDIES = {
  'audio': 'ask for text',
  'best_of': 'send a request for each answer, with another seed',
  'echo': 'put the prompt before the answer yourself',
  'n': 'send a request for each answer, with another seed',
  'functions': 'describe them in a message, and read the answer yourself',
  'tools': 'describe them in a message, and read the answer yourself',
  'response_format': 'describe the form in a message',
  'suffix': 'put all of the context into the prompt',
}


class ErrorContent(pydantic.BaseModel):
  """What went wrong, and how to fix it."""

  message: str
  type: str
  param: str | None
  code: str | None


class OpenAIError(pydantic.BaseModel):
  """An error in OpenAI's form."""

  error: ErrorContent


class StreamOptions(pydantic.BaseModel):
  """What a stream has besides the answer."""

  model_config = pydantic.ConfigDict(extra='forbid')

  include_usage: bool = False


class Request(pydantic.BaseModel):
  """What both kinds of requests have."""

  model_config = pydantic.ConfigDict(extra='allow')

  model: str = pydantic.Field(description='a subset, or the base')
  max_tokens: _Count | None = None
  temperature: float | None = pydantic.Field(
    None, ge=0, le=1e6, description='0 takes the most probable tokens'
  )
  top_p: float | None = pydantic.Field(None, gt=0, le=1)
  top_k: _Count | None = None
  seed: int | None = pydantic.Field(None, ge=0, le=_MOST_INT)
  stop: (
    _Stop
    | Annotated[list[_Stop], pydantic.Field(max_length=_MOST_STOPS)]
    | None
  ) = None
  stream: bool | None = None
  stream_options: StreamOptions | None = None
  user: str | None = pydantic.Field(None, description='has no effect')

  def check(self) -> None:
    """Checks the options that the types do not describe.

    Raises:
      ParameterError: one is not supported.
    """
    for name, value in (self.model_extra or {}).items():
      if value is None or value in _NEUTRAL.get(name, ()):
        continue
      if name in _NEUTRAL:
        remedy = _REMEDIES.get(name, 'leave it out')
        raise refusals.ParameterError(
          name, f'{name} is not supported: {remedy}', 'unsupported_parameter'
        )
      raise refusals.ParameterError(
        name, f'there is no option {name}: leave it out', 'unknown_parameter'
      )
    if self.stream_options is not None and not self.stream:
      raise refusals.ParameterError(
        'stream_options', 'stream_options has no effect without "stream": true'
      )

  @property
  def stops(self) -> tuple[str, ...]:
    """The stop strings."""
    stop = self.stop or ()
    return (stop,) if isinstance(stop, str) else tuple(stop)

  @property
  def sampling(self) -> decoding.Sampling | None:
    """How tokens are drawn; None for the most probable ones.

    Raises:
      ParameterError: the temperature is too low.
    """
    temperature = 1.0 if self.temperature is None else self.temperature
    if temperature == 0:
      return None
    if temperature < 1e-6:
      raise refusals.ParameterError(
        'temperature', 'temperature must be 0, or at least 1e-6'
      )
    return decoding.Sampling(
      temperature,
      self.top_k,
      1.0 if self.top_p is None else self.top_p,
      self.seed or 0,
    )

  @property
  def has_usage(self) -> bool:
    """Whether a stream ends with the usage."""
    return self.stream_options is not None and self.stream_options.include_usage


class Completion(Request):
  """Prompts to continue."""

  prompt: (
    str
    | Annotated[list[str], pydantic.Field(min_length=1)]
    | _Ids
    | Annotated[list[_Ids], pydantic.Field(min_length=1)]
  ) = pydantic.Field(description='texts, or ids of tokens')
  logprobs: int | None = pydantic.Field(None, ge=0, le=steps.ALTERNATIVES)

  @property
  def prompts(self) -> Sequence[str | list[int]]:
    """The prompts.

    Raises:
      ParameterError: there are too many.
    """
    prompt = self.prompt
    if isinstance(prompt, str):
      return [prompt]
    if isinstance(prompt[0], int):
      return [prompt]
    if len(prompt) > service_lib.MOST_INPUTS:
      raise refusals.ParameterError(
        'prompt',
        f'prompt has {len(prompt)} prompts, more than the'
        f' {service_lib.MOST_INPUTS} of a request: send several requests',
      )
    return prompt


class TextPart(pydantic.BaseModel):
  """A part of a message."""

  model_config = pydantic.ConfigDict(extra='allow')

  type: str
  text: str | None = None


class Message(pydantic.BaseModel):
  """A message of a conversation."""

  model_config = pydantic.ConfigDict(extra='allow')

  role: str
  content: str | list[TextPart] | None = None

  def as_dict(self, number: int) -> dict[str, Any]:
    """Returns the message as `conversations` has it.

    Raises:
      ParameterError: it has something else than text.
    """
    content = self.content
    if isinstance(content, list):
      for part in content:
        if part.type != 'text' or part.text is None:
          raise refusals.ParameterError(
            f'messages[{number}].content',
            f'messages[{number}] has a part of type {part.type!r}: this model'
            ' reads text only',
            'unsupported_parameter',
          )
      content = ''.join(part.text or '' for part in content)
    # OpenAI's newer name.
    role = 'system' if self.role == 'developer' else self.role
    return {'role': role, 'content': content, **(self.model_extra or {})}


class Chat(Request):
  """A conversation to continue."""

  messages: Annotated[list[Message], pydantic.Field(min_length=1)]
  max_completion_tokens: _Count | None = None
  logprobs: bool | None = None
  top_logprobs: int | None = pydantic.Field(None, ge=0, le=steps.ALTERNATIVES)

  def check(self) -> None:
    """See the base class."""
    super().check()
    if self.top_logprobs and not self.logprobs:
      raise refusals.ParameterError(
        'top_logprobs', 'top_logprobs has no effect without "logprobs": true'
      )
    both = {self.max_tokens, self.max_completion_tokens} - {None}
    if len(both) > 1:
      raise refusals.ParameterError(
        'max_tokens',
        'max_tokens and max_completion_tokens differ: give one of them',
      )
