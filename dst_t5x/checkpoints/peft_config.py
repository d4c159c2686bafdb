"""The settings of Hugging Face PEFT's adapters, and ours.

PEFT says what is adapted by a list of modules' names, or of their last parts;
we by a regular expression over paths. Of its many options we have few.
"""

from collections.abc import Collection
from typing import Any

from dst_t5x.adapters import api as adapters
from dst_t5x.adapters import known  # noqa: F401
from dst_t5x.adapters import peft
from dst_t5x.core import json_object
from dst_t5x.core.errors import UserError

# A kind that is no `adapters.Adapter` but a subset, see `shira_files`.
SHIRA = 'SHIRA'
# Entries of adapter_config.json that are read here, or change nothing of what
# a loaded adapter computes. Any other must be off.
_KNOWN = {
  *('auto_mapping', 'base_model_name_or_path', 'inference_mode', 'peft_type'),
  *('peft_version', 'revision', 'task_type'),
  # Which modules are adapted.
  *('exclude_modules', 'feedforward_modules', 'layers_pattern'),
  *('layers_to_transform', 'target_modules'),
  # LoRA.
  *('lora_alpha', 'lora_dropout', 'megatron_core', 'qalora_group_size', 'r'),
  *('runtime_config', 'use_dora', 'use_rslora'),
  # VeRA.
  *('d_initial', 'init_weights', 'projection_prng_key', 'save_projection'),
  'vera_dropout',
  # (IA)³.
  'init_ia3_weights',
  # Prompts.
  *('num_attention_heads', 'num_layers', 'num_transformer_submodules'),
  *('num_virtual_tokens', 'prompt_tuning_init', 'prompt_tuning_init_text'),
  *('token_dim', 'tokenizer_kwargs', 'tokenizer_name_or_path'),
  # SHiRA: how its mask was drawn, which the file has.
  *('init_weights', 'mask_type', 'random_seed'),
}
_OFF: tuple[Any, ...] = (None, False, 'none', '', [], {})
# The others have changed the weights of the base, too.
_INITIALIZATIONS = (None, True, False, 'gaussian', 'orthogonal', 'eva')


def export(
  adapter: adapters.Adapter, modules: Collection[str], base: peft.Base
) -> dict[str, Any]:
  """Returns what adapter_config.json says of an adapter.

  Args:
    adapter: one that PEFT has.
    modules: paths of the linear maps that it adapts.
    base: the model that it belongs to.
  """
  stated: dict[str, Any] = {'peft_type': adapter.peft_type}
  if modules:
    stated['target_modules'] = target_modules(modules, base)
  return stated | adapter.peft_settings(modules, base)


def read(
  stated: json_object.JsonObject, modules: Collection[str], base: peft.Base
) -> adapters.Adapter:
  """Returns the adapter that an adapter_config.json states.

  Args:
    stated: its content.
    modules: paths of the linear maps that it adapts.
    base: the model that it belongs to.

  Raises:
    UserError: its kind or an option is not known here, or makes no sense.
  """
  check_options(stated)
  name = stated.get('peft_type', str)
  kinds = [kind for kind in adapters.Adapter.kinds.values() if kind.peft_type]
  known_types = {kind.peft_type for kind in kinds}
  if name not in known_types:
    raise UserError(
      f'peft_type {json_object.shown(name)} is not known here (only'
      f' {", ".join(sorted({*known_types, SHIRA}))}): merge the adapter into '
      'its base with peft, merge_and_unload()'
    )
  # Subclasses come later, and `max` takes the first.
  kind = max(
    (kind for kind in kinds if kind.peft_type == name and _has(stated, kind)),
    key=lambda kind: len(kind.peft_options),
  )
  return kind.peft_read(stated, modules, base)


def _has(stated: json_object.JsonObject, kind: type[adapters.Adapter]) -> bool:
  """Returns whether an adapter_config.json has the options of a kind."""
  return all(
    stated.get(key, type(value), None) == value
    for key, value in kind.peft_options.items()
  )


def check_options(stated: json_object.JsonObject) -> None:
  """Refuses options that change what is computed and that we do not have.

  Raises:
    UserError: there is one.
  """
  for key, value in stated.content.items():
    is_known = key in _KNOWN or value in _OFF
    if key == 'init_lora_weights':
      is_known = value in _INITIALIZATIONS
    if not is_known:
      raise UserError(
        f'{key} = {json_object.shown(value)} is not known here: merge the'
        ' adapter into its base with peft, merge_and_unload()'
      )


def target_modules(modules: Collection[str], base: peft.Base) -> list[str]:
  """Returns PEFT's names of linear maps: their last parts where that is exact.

  Arguments as of `export`.
  """
  ends = peft.last_parts(modules, base)
  if all(
    (name.rpartition('.')[2] in ends) == (module in modules)
    for module, name in base.names.items()
  ):
    return ends
  return sorted(base.names[module] for module in modules)
