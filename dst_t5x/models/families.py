"""The registry of model families; see `hugging_face.Family`."""

from collections.abc import Collection
from typing import Any

from dst_t5x.core import json_object
from dst_t5x.core import parts
from dst_t5x.core.errors import UserError
from dst_t5x.models import hugging_face
from dst_t5x.models.decoder_only import family as decoder_only
from dst_t5x.models.t5 import family as t5

FAMILIES: tuple[hugging_face.Family, ...] = (
  t5.T5(),
  decoder_only.DecoderOnly(),
)
_OTHER = hugging_face.Family()


def of_config(stated: json_object.JsonObject) -> hugging_face.Family:
  """Returns the family that a config.json belongs to.

  Raises:
    UserError: no family knows its `model_type`.
  """
  model_type = stated.content.get('model_type')
  for family in FAMILIES:
    if model_type in family.model_types:
      return family
  folder, _, file = stated.where.rpartition('/')
  known = [repr(name) for family in FAMILIES for name in family.model_types]
  raise UserError(
    f'{folder} is no {_names()} model: its {file} has model_type'
    f' {json_object.shown(model_type)}, not {" or ".join(known)}'
  )


def of_gguf(metadata: json_object.JsonObject) -> hugging_face.Family:
  """Returns the family that a GGUF file's metadata state.

  Raises:
    UserError: none.
  """
  name = metadata.get('general.architecture', str)
  known = [name for family in FAMILIES for name in family.gguf_architectures]
  for family in FAMILIES:
    if name in family.gguf_architectures:
      return family
  raise UserError(
    f'{metadata.where} has the architecture {json_object.shown(name)}; of GGUF'
    f' files, {", ".join(known)} are read'
  )


def of_paths(paths: Collection[str]) -> hugging_face.Family:
  """Returns the family of parameters with these paths, layers unstacked."""
  return next((f for f in FAMILIES if f.has(paths)), _OTHER)


def of(params: Any) -> hugging_face.Family:
  """Returns the family of parameters, unstacked nested dicts."""
  return of_paths(parts.flatten(params))


def network_of(params: Any) -> Any:
  """Returns the `api.Network` whose parameters have these shapes.

  Args:
    params: unstacked nested dicts of anything with a shape.

  Raises:
    UserError: they are of no known family, or do not determine the network.
  """
  family = of(params)
  if family is _OTHER:
    raise UserError(f'no {_names()} model has these tensors')
  return family.network_of(params)


def recorded(model: json_object.JsonObject) -> Any:
  """Returns the `api.Network` of a run; None if the package has no such one.

  Args:
    model: `model` of the run's `run.json`.

  Raises:
    UserError: it is damaged.
  """
  for family in FAMILIES:
    if family.network_id == model.content.get('id'):
      return family.recorded(model.inner('config'))
  return None


def _names() -> str:
  return ' or '.join(family.name for family in FAMILIES)
