"""Our config of a Hugging Face config.json, and the reverse.

What changes what is computed is read, or refused by name unless it is what the
network here has; the rest, such as how to sample, is not looked at.
"""

from collections.abc import Mapping
from typing import Any

from dst_t5x.core import json_object
from dst_t5x.core.errors import UserError
from dst_t5x.models.decoder_only import hf_rope
from dst_t5x.models.decoder_only.config import DecoderConfig
from dst_t5x.models.decoder_only.config import differing
from dst_t5x.models.decoder_only.hf_families import FAMILIES
from dst_t5x.models.decoder_only.hf_families import Family

# Key -> what the network here has; Transformers takes the same where the key is
# missing. Nothing but a missing one is known where there is none.
_FIXED: Mapping[str, tuple[Any, ...]] = {
  # Biases of the output projection and of the feed-forward block.
  'attention_bias': (False,),
  'mlp_bias': (False,),
  'attention_dropout': (0.0, 0),
  'use_bidirectional_attention': (False,),
  'partial_rotary_factor': (1.0, 1),
  # A mixture of experts.
  'n_routed_experts': (),
  'num_experts': (),
  'num_local_experts': (),
  # What replaces weights, or changes them once they are loaded.
  'pruned_heads': ({},),
  'quantization_config': (),
  'transformers_weights': (),
}
# Names of all tensors are made before the first one is read.
_MOST_LAYERS = 10_000
_LOCAL, _GLOBAL = 'sliding_attention', 'full_attention'


def config_from_hf(
  content: Mapping[str, Any], where: str = 'config.json'
) -> DecoderConfig:
  """Returns what a config.json states.

  Args:
    content: of the file, parsed.
    where: the file, for messages.

  Raises:
    UserError: it is of another family, or states what the network here has not.
  """
  stated = json_object.JsonObject(dict(content), where)
  family = _family(stated)
  _check_fixed(stated, family)
  layers = stated.size('num_hidden_layers', most=_MOST_LAYERS)
  heads = stated.size('num_attention_heads')
  caps = _caps(stated, family)
  window, local_layers = _windows(stated, family, layers)
  context_length = stated.size('max_position_embeddings', family.context_length)
  rope, local_rope = hf_rope.ropes(stated, family, context_length)
  return DecoderConfig(
    vocab_size=stated.size('vocab_size'),
    emb_dim=stated.size('hidden_size'),
    num_layers=layers,
    num_heads=heads,
    num_kv_heads=_kv_heads(stated, family, heads),
    head_dim=_head_dim(stated, family, heads),
    mlp_dim=stated.size('intermediate_size'),
    context_length=context_length,
    eos_id=_eos_id(stated, family),
    begin_id=_id(stated, 'bos_token_id', 2) if family.begins else None,
    mlp_activation=_activation(stated, family),
    rope=rope,
    local_rope=local_rope if any(local_layers) else None,
    sliding_window=window,
    local_layers=local_layers,
    norm_epsilon=hf_rope.above_zero(stated, 'rms_norm_eps', 1e-6),
    query_scalar=_query_scalar(stated, family),
    attention_logit_cap=caps[0],
    logit_cap=caps[1],
    logits_via_embedding=stated.get('tie_word_embeddings', bool, family.tied),
    **family.options,
  )


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
  """Returns the config.json of a network, float32.

  Raises:
    UserError: no family of Hugging Face's has these options.
  """
  model_type = _model_type(config)
  family = FAMILIES[model_type]
  content: dict[str, Any] = {
    'architectures': [family.architecture],
    'attention_bias': False,
    'bos_token_id': config.begin_id,
    'eos_token_id': config.eos_id,
    'head_dim': config.head_dim,
    'hidden_size': config.emb_dim,
    'intermediate_size': config.mlp_dim,
    'max_position_embeddings': config.context_length,
    'model_type': model_type,
    'num_attention_heads': config.num_heads,
    'num_hidden_layers': config.num_layers,
    'num_key_value_heads': config.num_kv_heads,
    'rms_norm_eps': config.norm_epsilon,
    'tie_word_embeddings': config.logits_via_embedding,
    'torch_dtype': 'float32',
    'vocab_size': config.vocab_size,
    family.activation_key: next(
      theirs
      for theirs, ours in family.activations.items()
      if ours == config.mlp_activation
    ),
    **hf_rope.stated(config.rope, config.local_rope, family),
  }
  if family.caps is not None:
    content['attn_logit_softcapping'] = config.attention_logit_cap
    content['final_logit_softcapping'] = config.logit_cap
  if family.query_scalar is not None:
    scalar = config.query_scalar or float(config.head_dim)
    content['query_pre_attn_scalar'] = (
      int(scalar) if scalar == int(scalar) else scalar
    )
  if family.sliding_window:
    content['sliding_window'] = config.sliding_window
    content['layer_types'] = [
      _LOCAL if is_local else _GLOBAL for is_local in config.is_local
    ]
  if family.window_is_optional:
    content['use_sliding_window'] = config.sliding_window is not None
  _check_stated(content, config)
  return content


def architecture(config: DecoderConfig) -> str:
  """Returns Transformers' class of a network.

  Raises:
    UserError: no family of Hugging Face's has these options.
  """
  return FAMILIES[_model_type(config)].architecture


def _model_type(config: DecoderConfig) -> str:
  """Returns the family whose options a config has."""
  for model_type, family in FAMILIES.items():
    known = {name for other in FAMILIES.values() for name in other.options}
    if all(
      getattr(config, name) == family.options.get(name, False) for name in known
    ):
      return model_type
  options = {
    name: getattr(config, name)
    for family in FAMILIES.values()
    for name in family.options
  }
  raise UserError(
    f'no family of Hugging Face has these options together: {options}'
  )


def _check_stated(content: Mapping[str, Any], config: DecoderConfig) -> None:
  """Raises UserError unless a config.json states all of a config."""
  for name in differing(config, config_from_hf(content)):
    raise UserError(
      f'a Hugging Face model of the family {content["model_type"]} cannot'
      f' have {name} = {getattr(config, name)!r}'
    )


def _family(stated: json_object.JsonObject) -> Family:
  """Returns the family that `model_type` names."""
  name = stated.get('model_type', str)
  if name not in FAMILIES:
    raise stated.refusal('model_type', f'must be one of {", ".join(FAMILIES)}')
  return FAMILIES[name]


def _check_fixed(stated: json_object.JsonObject, family: Family) -> None:
  """Refuses what the network here has otherwise."""
  fixed = dict(_FIXED)
  if not family.sliding_window:
    fixed['sliding_window'] = ()
  for key, known in fixed.items():
    value = stated.content.get(key)
    # By type, too: `true` is no 1.
    if value is None or any(
      type(value) is type(x) and value == x for x in known
    ):
      continue
    wanted = f'not {known[0]!r}' if known else 'which is not known here'
    raise UserError(
      f'{stated.where} has {key} {json_object.shown(value)}, {wanted}'
    )


def _kv_heads(
  stated: json_object.JsonObject, family: Family, heads: int
) -> int:
  default = heads if family.kv_heads_are_optional else None
  kv_heads = stated.size('num_key_value_heads', default)
  if kv_heads is None:
    raise UserError(f"{stated.where} lacks 'num_key_value_heads'")
  if heads % kv_heads:
    raise stated.refusal(
      'num_key_value_heads', f'must divide num_attention_heads, {heads}'
    )
  return kv_heads


def _head_dim(
  stated: json_object.JsonObject, family: Family, heads: int
) -> int:
  default = family.head_dim or stated.size('hidden_size') // heads
  head_dim = stated.size('head_dim', default)
  if head_dim % 2:
    raise stated.refusal('head_dim', 'must be even')
  return head_dim


def _activation(stated: json_object.JsonObject, family: Family) -> Any:
  key = family.activation_key
  name = stated.get(key, str, next(iter(family.activations)))
  if name not in family.activations:
    known = ', '.join(family.activations)
    raise stated.refusal(key, f'must be one of {known}')
  return family.activations[name]


def _id(stated: json_object.JsonObject, key: str, default: int) -> int:
  """Returns the id of a special token."""
  value = stated.get(key, int, default)
  if value < 0:
    raise stated.refusal(key, 'must be the id of a token')
  return value


def _eos_id(stated: json_object.JsonObject, family: Family) -> int:
  """Returns the end token; the first, where there are several."""
  value = stated.content.get('eos_token_id')
  if isinstance(value, list) and value:
    first = {**stated.content, 'eos_token_id': value[0]}
    stated = json_object.JsonObject(first, stated.where)
  elif value is None and family.eos_id is None:
    raise UserError(f"{stated.where} lacks 'eos_token_id'")
  return _id(stated, 'eos_token_id', family.eos_id or 0)


def _caps(
  stated: json_object.JsonObject, family: Family
) -> tuple[float | None, float | None]:
  """Returns the caps of attention's and of the final logits."""
  if family.caps is None:
    return None, None
  keys = 'attn_logit_softcapping', 'final_logit_softcapping'

  def cap(key: str, default: float | None) -> float | None:
    # `null` is no default here, but no cap.
    if key not in stated.content:
      return default
    return hf_rope.above_zero(stated, key, None)

  return cap(keys[0], family.caps[0]), cap(keys[1], family.caps[1])


def _query_scalar(
  stated: json_object.JsonObject, family: Family
) -> float | None:
  if family.query_scalar is None:
    return None
  key = 'query_pre_attn_scalar'
  return hf_rope.above_zero(stated, key, family.query_scalar)


def _windows(
  stated: json_object.JsonObject, family: Family, layers: int
) -> tuple[int | None, tuple[bool, ...]]:
  """Returns the sliding window, and which layers have it."""
  is_on = bool(family.sliding_window)
  if family.window_is_optional:
    is_on = stated.get('use_sliding_window', bool, False)
  types = stated.get('layer_types', list, None) if family.sliding_window else []
  if types is None:
    types = _default_types(stated, family, layers, is_on)
  if types and len(types) != layers:
    raise stated.refusal('layer_types', f'must have {layers} entries')
  for name in types:
    if name not in (_LOCAL, _GLOBAL):
      raise stated.refusal('layer_types', f'must be of {_LOCAL}, {_GLOBAL}')
  is_local = tuple(name == _LOCAL for name in types)
  if not any(is_local):
    return None, (False,)
  if not is_on:
    raise stated.refusal(
      'use_sliding_window', f'must be true where layer_types has {_LOCAL}'
    )
  missing = 'sliding_window' in stated.content
  default = None if missing else family.sliding_window
  window = stated.size('sliding_window', default)
  if window is None:
    raise stated.refusal('sliding_window', f'must be a number for {_LOCAL}')
  return window, _shortest(is_local)


def _default_types(
  stated: json_object.JsonObject, family: Family, layers: int, is_on: bool
) -> list[str]:
  """Returns the kind of each layer where `layer_types` is not stated."""
  if not is_on:
    return [_GLOBAL] * layers
  if not family.period:
    first = stated.get('max_window_layers', int, 28)
    return [_LOCAL if i >= first else _GLOBAL for i in range(layers)]
  period = family.period
  if family.local_theta is not None:
    period = stated.size('sliding_window_pattern', period)
  return [_LOCAL if (i + 1) % period else _GLOBAL for i in range(layers)]


def _shortest(pattern: tuple[bool, ...]) -> tuple[bool, ...]:
  """Returns the shortest pattern that gives this one when repeated."""
  size = len(pattern)
  for period in range(1, size):
    if all(pattern[i] == pattern[i % period] for i in range(size)):
      return pattern[:period]
  return pattern
