"""Decoder-only models as Hugging Face has them."""

from collections.abc import Callable, Collection, Mapping
import functools
from typing import Any, ClassVar

import numpy as np

from dst_t5x.core import json_object
from dst_t5x.core import parts
from dst_t5x.core.errors import UserError
from dst_t5x.models import hugging_face
from dst_t5x.models.decoder_only import config as config_lib
from dst_t5x.models.decoder_only import gguf_config
from dst_t5x.models.decoder_only import hf_config
from dst_t5x.models.decoder_only import hf_families
from dst_t5x.models.decoder_only import hf_names
from dst_t5x.models.decoder_only.config import DecoderConfig
from dst_t5x.models.decoder_only.rope import Rope

PyTree = Any

_EMBEDDING = 'token_embedder/embedding'
_LAYER = 'decoder/layers_0'
_OF_TASKS = ('context_length', 'eos_id')
_MODULES = {
  'logits_dense': 'output projection',
  'mlp': 'feed-forward',
  'self_attention': 'self-attention',
  'token_embedder': 'embeddings',
}


class DecoderOnly(hugging_face.Family):
  """Gemma, Llama, Qwen and those like them; see `hugging_face.Family`."""

  name: ClassVar[str] = 'decoder-only'
  model_types: ClassVar[Collection[str]] = tuple(hf_families.FAMILIES)
  task_type: ClassVar[str | None] = 'CAUSAL_LM'
  # Those of (IA)³ are not the same in all of them.
  default_targets: ClassVar[Mapping[str, list[str]]] = {
    'LORA': ['q_proj', 'v_proj'],
    'VERA': ['q_proj', 'v_proj'],
  }
  head: ClassVar[str] = hf_names.HEAD.removesuffix('.weight')
  network_id: ClassVar[str] = 'decoder_only'
  gguf_architectures: ClassVar[Collection[str]] = tuple(
    gguf_config.ARCHITECTURES
  )

  def has(self, paths: Collection[str]) -> bool:
    """See `hugging_face.Family`."""
    return f'{_LAYER}/pre_self_attention_layer_norm/scale' in paths and not any(
      path.startswith('encoder/') for path in paths
    )

  def read(self, stated: json_object.JsonObject) -> hugging_face.Model:
    """See `hugging_face.Family`."""
    return _model(hf_config.config_from_hf(stated.content, stated.where))

  def read_gguf(
    self,
    metadata: json_object.JsonObject,
    shapes: Mapping[str, tuple[int, ...]],
    tensor: Callable[[str], np.ndarray],
  ) -> hugging_face.GgufModel:
    """See `hugging_face.Family`."""
    name = gguf_config.FREQUENCIES
    factors = tensor(name) if name in shapes else None
    content = gguf_config.config_of(metadata, shapes, factors)
    config = hf_config.config_from_hf(content, metadata.where)
    architecture = metadata.get('general.architecture', str)
    return hugging_face.GgufModel(
      model=_model(config),
      restored=functools.partial(
        gguf_config.as_hugging_face_has_it, architecture, config
      ),
      unused=(name,),
    )

  def written(
    self, network: Any, params: PyTree
  ) -> tuple[hugging_face.Model, dict[str, Any]]:
    """See `hugging_face.Family`."""
    del params
    content = hf_config.config_to_hf(network.config)
    return _model(network.config), content

  def network_of(self, params: PyTree) -> Any:
    """Raises UserError: shapes tell neither heads nor positions."""
    raise UserError(
      'the shapes of a decoder-only model do not tell its heads and its rotary'
      ' positions: its config.json or its gin file is needed'
    )

  def recorded(self, config: json_object.JsonObject) -> Any:
    """See `hugging_face.Family`."""
    from dst_t5x.models.decoder_only import network

    inner = {'rope': Rope, 'local_rope': Rope}
    return network.Transformer(
      hugging_face.from_record(DecoderConfig, config, inner)
    )

  def differing(self, network: Any, stated: Any) -> Collection[str]:
    """See `hugging_face.Family`; a task may have another end and length."""
    names = config_lib.differing(network.config, stated.config)
    return [name for name in names if name not in _OF_TASKS]

  def sizes(self, params: PyTree) -> dict[str, int]:
    """See `hugging_face.Family`."""
    shapes = {k: tuple(v.shape) for k, v in parts.flatten(params).items()}
    found = {}
    if len(shape := shapes.get(_EMBEDDING, ())) == 2:
      found['vocab_size'], found['emb_dim'] = shape
    found['num_layers'] = len(
      {path.split('/')[1] for path in shapes if path.startswith(_LAYER[:-1])}
    )
    if len(shape := shapes.get(f'{_LAYER}/mlp/wi_0/kernel', ())) == 2:
      found['mlp_dim'] = shape[1]
    return found

  def linear_map(self, path: str) -> str:
    """See `hugging_face.Family`."""
    return hf_names.linear_map(path)

  def module_name(self, module: str) -> str:
    """See `hugging_face.Family`; norms have one name."""
    part = module.rpartition('/')[2]
    return 'norms' if 'norm' in part else _MODULES.get(part, part)


def _model(config: DecoderConfig) -> hugging_face.Model:
  from dst_t5x.models.decoder_only import network  # Flax: reports do without.

  return hugging_face.Model(
    network=network.Transformer(config),
    architecture=hf_config.architecture(config),
    tensors=hf_names.layout(config),
    copies=hf_names.copies(config),
    unused=hf_names.UNUSED,
  )
