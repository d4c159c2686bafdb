"""Decoder-only models as Hugging Face has them: Gemma, Llama, Qwen, SmolLM2."""

from collections.abc import Collection, Mapping
from typing import Any, ClassVar

from dst_t5x.core import json_object
from dst_t5x.core.errors import UserError
from dst_t5x.models import hugging_face
from dst_t5x.models.decoder_only import hf_config
from dst_t5x.models.decoder_only import hf_families
from dst_t5x.models.decoder_only import hf_names
from dst_t5x.models.decoder_only import network

PyTree = Any

_NORM = 'decoder/layers_0/pre_self_attention_layer_norm/scale'
_MODULES = {
  'logits_dense': 'output projection',
  'mlp': 'feed-forward',
  'self_attention': 'self-attention',
  'token_embedder': 'embeddings',
}


class DecoderOnly(hugging_face.Family):
  """All families of `hf_families`; see `hugging_face.Family`."""

  name: ClassVar[str] = 'Gemma, Llama or Qwen'
  model_types: ClassVar[Collection[str]] = tuple(hf_families.FAMILIES)
  task_type: ClassVar[str | None] = 'CAUSAL_LM'
  # PEFT adapts other maps of a Llama by default than of the other models.
  default_targets: ClassVar[Mapping[str, list[str]]] = {
    'LORA': ['q_proj', 'v_proj'],
  }
  head: ClassVar[str] = hf_names.HEAD.removesuffix('.weight')

  def has(self, paths: Collection[str]) -> bool:
    """See `hugging_face.Family`."""
    has_encoder = any(path.startswith('encoder/') for path in paths)
    return _NORM in paths and not has_encoder

  def read(self, stated: json_object.JsonObject) -> hugging_face.Model:
    """See `hugging_face.Family`."""
    config = hf_config.config_from_hf(stated.content, stated.where)
    return _model(network.Transformer(config))

  def written(
    self, network: Any, params: PyTree
  ) -> tuple[hugging_face.Model, dict[str, Any]]:
    """See `hugging_face.Family`."""
    del params
    return _model(network), hf_config.config_to_hf(network.config)

  def network_of(self, params: PyTree) -> network.Transformer:
    """Raises UserError: heads, RoPE and windows are in no shape."""
    raise UserError(
      'the tensors of a decoder-only model do not tell its heads, RoPE and '
      'windows, so that no config.json can be written'
    )

  def linear_map(self, path: str) -> str:
    """See `hugging_face.Family`."""
    return hf_names.linear_map(path)

  def module_name(self, module: str) -> str:
    """See `hugging_face.Family`; layer norms have one name."""
    part = module.rpartition('/')[2]
    return 'layer norms' if 'norm' in part else _MODULES.get(part, part)


def _model(transformer: network.Transformer) -> hugging_face.Model:
  config = transformer.config
  family = hf_families.FAMILIES[hf_config.model_type(config)]
  return hugging_face.Model(
    network=transformer,
    architecture=family.architecture,
    tensors=hf_names.layout(config),
    copies=hf_names.copies(config),
    unused=hf_names.UNUSED,
  )
