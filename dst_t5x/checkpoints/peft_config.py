"""The settings of Hugging Face PEFT's adapters, and ours.

PEFT says what is adapted by a list of modules' names, or of their last parts;
we by a regular expression over paths. Of its many options we have few.
"""

from collections.abc import Collection
import re
from typing import Any

from dst_t5x.adapters import api as adapters
from dst_t5x.adapters import ia3
from dst_t5x.adapters import lora
from dst_t5x.adapters import prompts
from dst_t5x.core import json_object
from dst_t5x.core.errors import UserError
from dst_t5x.models.t5 import hf_names

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
  'runtime_config',
  # (IA)³.
  'init_ia3_weights',
  # Prompts.
  *('num_attention_heads', 'num_layers', 'num_transformer_submodules'),
  *('num_virtual_tokens', 'prompt_tuning_init', 'prompt_tuning_init_text'),
  *('token_dim', 'tokenizer_kwargs', 'tokenizer_name_or_path'),
}
_OFF: tuple[Any, ...] = (None, False, 'none', '', [], {})
# The others have changed the weights of the base, too.
_INITIALIZATIONS = (None, True, False, 'gaussian', 'orthogonal', 'eva')


def export(
  adapter: adapters.Adapter, modules: Collection[str], known: Collection[str]
) -> dict[str, Any]:
  """Returns what adapter_config.json says of an adapter.

  Args:
    adapter: LoRA, (IA)³ or a prompt.
    modules: paths of the linear maps that it adapts.
    known: paths of all of the base's.

  Raises:
    UserError: PEFT has no such adapter.
  """
  match adapter:
    case lora.LoRA():
      return {
        'peft_type': 'LORA',
        'r': adapter.rank,
        'lora_alpha': adapter.alpha,
        'lora_dropout': adapter.dropout_rate,
        'target_modules': _target_modules(modules, known),
      }
    case ia3.IA3():
      return {
        'peft_type': 'IA3',
        'target_modules': _target_modules(modules, known),
        'feedforward_modules': ['wo'],
      }
    case prompts.Prompt():
      return {
        'peft_type': 'PROMPT_TUNING',
        'num_virtual_tokens': adapter.length,
        'num_transformer_submodules': 1,  # The encoder alone.
      }
  raise UserError(f'PEFT has no format for {type(adapter).__name__}')


def read(
  stated: json_object.JsonObject,
  modules: Collection[str],
  known: Collection[str],
) -> adapters.Adapter:
  """Returns the adapter that an adapter_config.json states.

  Args:
    stated: its content.
    modules: paths of the linear maps that it adapts.
    known: paths of all of the base's.

  Raises:
    UserError: its kind or an option is not known here, or makes no sense.
  """
  _check_options(stated)
  kind = stated.get('peft_type', str)
  match kind:
    case 'LORA':
      return lora.LoRA(
        rank=stated.size('r'),
        alpha=stated.get('lora_alpha', float),
        dropout_rate=stated.get('lora_dropout', float, 0.0),
        targets=_targets(modules, known),
      )
    case 'IA3':
      all_of_ours = f'{ia3.OUTPUTS}|{ia3.INPUTS}'
      if set(modules) != {m for m in known if re.fullmatch(all_of_ours, m)}:
        raise UserError('here, (IA)³ is of all k, v and wo, and only these')
      return ia3.IA3()
    case 'PROMPT_TUNING':
      return prompts.Prompt(length=stated.size('num_virtual_tokens'))
  raise UserError(
    f'peft_type {json_object.shown(kind)} is not known here (only LORA, IA3,'
    ' PROMPT_TUNING): merge the adapter into its base with peft,'
    ' merge_and_unload()'
  )


def _check_options(stated: json_object.JsonObject) -> None:
  """Refuses options that change what is computed and that we do not have."""
  for key, value in stated.content.items():
    is_known = key in _KNOWN or value in _OFF
    if key == 'init_lora_weights':
      is_known = value in _INITIALIZATIONS
    if not is_known:
      raise UserError(
        f'{key} = {json_object.shown(value)} is not known here: merge the'
        ' adapter into its base with peft, merge_and_unload()'
      )


def _target_modules(
  modules: Collection[str], known: Collection[str]
) -> list[str]:
  """Returns PEFT's names of linear maps: their last parts where that is exact.

  Arguments as of `export`.
  """
  names = {module: hf_names.linear_map(module) for module in known}
  ends = {names[module].rpartition('.')[2] for module in modules}
  if all(
    (name.rpartition('.')[2] in ends) == (module in modules)
    for module, name in names.items()
  ):
    return sorted(ends)
  return sorted(names[module] for module in modules)


def _targets(modules: Collection[str], known: Collection[str]) -> str:
  """Returns the LORA_TARGETS that match just these linear maps.

  Arguments as of `read`.
  """
  ends = '|'.join(sorted({module.rpartition('/')[2] for module in modules}))
  # All layers of a stack, which the network may have stacked.
  stacks = {re.sub(r'layers_\d+', r'layers(_\\d+)?', m) for m in modules}
  for targets in (
    f'.*attention/({ends})',
    f'.*/({ends})',
    '|'.join(sorted(stacks)),
  ):
    if {m for m in known if re.fullmatch(targets, m)} == set(modules):
      return targets
  return '|'.join(sorted(map(re.escape, modules)))
