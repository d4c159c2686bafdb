"""Rotary positions in a Hugging Face config.json.

Transformers 5 states them in `rope_parameters`, older versions in `rope_theta`,
`rope_scaling` and, of Gemma's local layers, `rope_local_base_freq`. Both are
read; the older names are written, which either version reads.
"""

from typing import Any

from dst_t5x.core import json_object
from dst_t5x.core.errors import UserError
from dst_t5x.models.decoder_only.hf_families import Family
from dst_t5x.models.decoder_only.rope import Rope

_NEW, _OLD = 'rope_parameters', 'rope_scaling'


def above_zero(stated: json_object.JsonObject, key: str, default: Any) -> Any:
  """Returns an entry that is a float above 0, or the default.

  Raises:
    UserError: it is none.
  """
  value = stated.get(key, float, default)
  if value is not default and not value > 0:
    raise stated.refusal(key, 'must be above 0')
  return value


def ropes(
  stated: json_object.JsonObject, family: Family, context_length: int
) -> tuple[Rope, Rope | None]:
  """Returns the rotary positions of global layers, and of local ones.

  Args:
    stated: the config.json.
    family: of the model.
    context_length: `max_position_embeddings`.

  Raises:
    UserError: they are of a kind that the network here has not.
  """
  theta = above_zero(stated, 'rope_theta', family.theta)
  new = stated.get(_NEW, dict, {})
  old = stated.get(_OLD, dict, {})
  kinds = ('full_attention', 'sliding_attention')
  is_nested = any(kind in new for kind in kinds)
  if family.local_theta is None:
    if is_nested:
      raise stated.refusal(_NEW, 'must not differ between layers')
    return _rope(stated, old or new, theta, context_length), None
  if new and not is_nested:
    raise stated.refusal(_NEW, f'must have {kinds[0]} and {kinds[1]}')
  local_theta = above_zero(stated, 'rope_local_base_freq', family.local_theta)
  inner = json_object.JsonObject(new, f'{_NEW} in {stated.where}')
  of_kinds = [inner.get(kind, dict, {}) for kind in kinds]
  return (
    _rope(stated, {**of_kinds[0], **old}, theta, context_length),
    _rope(stated, of_kinds[1], local_theta, context_length),
  )


def _rope(
  stated: json_object.JsonObject,
  content: dict[str, Any],
  theta: float,
  context_length: int,
) -> Rope:
  """Returns the rotary positions that a part of a config.json states."""
  # An older name of `rope_type`.
  kind = content.get('rope_type') or content.get('type') or 'default'
  entries = json_object.JsonObject(content, f'RoPE in {stated.where}')
  theta = above_zero(entries, 'rope_theta', theta)
  if entries.get('partial_rotary_factor', float, 1.0) != 1.0:
    raise entries.refusal('partial_rotary_factor', 'must be 1')
  if kind == 'default':
    return Rope(theta)
  if kind not in ('linear', 'llama3'):
    raise UserError(
      f'{entries.where}: rope_type must be default, linear or llama3, it is'
      f' {json_object.shown(kind)}'
    )
  factor = _needed(entries, 'factor')
  if kind == 'linear':
    return Rope(theta, factor)
  low = _needed(entries, 'low_freq_factor')
  high = _needed(entries, 'high_freq_factor')
  if low >= high:
    raise entries.refusal('low_freq_factor', f'must be below {high:g}')
  key = 'original_max_position_embeddings'
  length = entries.size(key, context_length)
  return Rope(theta, factor, length, low, high)


def _needed(entries: json_object.JsonObject, key: str) -> float:
  """Returns an entry that must be a number above 0."""
  entries.get(key, float)
  return above_zero(entries, key, 1.0)


def stated(
  rope: Rope, local_rope: Rope | None, family: Family
) -> dict[str, Any]:
  """Returns what a config.json states of rotary positions.

  Args:
    rope: of global layers.
    local_rope: of local layers.
    family: of the model; it may have no names for all of it.
  """
  content: dict[str, Any] = {'rope_theta': rope.theta}
  if family.local_theta is not None:
    content['rope_local_base_freq'] = (local_rope or rope).theta
  if rope.original_length is not None:
    content[_OLD] = {
      'rope_type': 'llama3',
      'factor': rope.factor,
      'low_freq_factor': rope.low_frequency_factor,
      'high_freq_factor': rope.high_frequency_factor,
      'original_max_position_embeddings': rope.original_length,
    }
  elif rope.factor != 1.0:
    content[_OLD] = {'rope_type': 'linear', 'factor': rope.factor}
  return content
