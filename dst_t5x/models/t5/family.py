"""The T5 1.1 family: its Hugging Face format, names and sizes."""

from collections.abc import Collection, Mapping
import dataclasses
from typing import Any, ClassVar

from dst_t5x.core import json_object
from dst_t5x.core import parts
from dst_t5x.core.errors import UserError
from dst_t5x.models import hugging_face
from dst_t5x.models.t5 import config as t5_config
from dst_t5x.models.t5 import hf_config
from dst_t5x.models.t5 import hf_names
from dst_t5x.models.t5 import sizes

PyTree = Any

_RELATIVE = 'encoder/relpos_bias/rel_embedding'
_MODULES = {
  'logits_dense': 'output projection',
  'self_attention': 'decoder self-attention',
  'encoder_decoder_attention': 'cross-attention',
  'token_embedder': 'embeddings',
}


class T5(hugging_face.Family):
  """T5 1.1; see `hugging_face.Family`."""

  name: ClassVar[str] = 'T5 1.1'
  # mT5's models are T5 1.1 with another vocabulary.
  model_types: ClassVar[Collection[str]] = ('t5', 'mt5')
  task_type: ClassVar[str | None] = 'SEQ_2_SEQ_LM'
  default_targets: ClassVar[Mapping[str, list[str]]] = {
    'LORA': ['q', 'v'],
    'IA3': ['k', 'v', 'wo'],
    'VERA': ['q', 'v'],
  }
  head: ClassVar[str] = hf_names.HEAD.removesuffix('.weight')
  network_id: ClassVar[str] = 't5_1_1'

  def has(self, paths: Collection[str]) -> bool:
    """See `hugging_face.Family`."""
    return any(path.startswith('encoder/') for path in paths)

  def read(self, stated: json_object.JsonObject) -> hugging_face.Model:
    """See `hugging_face.Family`."""
    config = hf_config.read(stated)
    substitutes = {}
    if config.head_may_be_embedding:
      # Transformers 5 states tied embeddings for every T5. It omits the head
      # from the file only if the head is the embedding.
      substitutes[hf_names.HEAD] = hf_names.EMBEDDING
    model = _model(config.network, config.num_buckets, substitutes)
    if stated.content.get('model_type') == 'mt5':
      return dataclasses.replace(model, architecture=f'M{model.architecture}')
    return model

  def written(
    self, network: Any, params: PyTree
  ) -> tuple[hugging_face.Model, dict[str, Any]]:
    """See `hugging_face.Family`."""
    relative = parts.flatten(params).get(_RELATIVE)
    num_buckets = 0 if relative is None else relative.shape[-1]
    stated = hf_config.stated(network.config, num_buckets)
    return _model(network.config, num_buckets, {}), stated

  def network_of(self, params: PyTree) -> Any:
    """See `hugging_face.Family`."""
    found = sizes.sizes(params)
    try:
      config = t5_config.T5Config(
        vocab_size=found['vocab_size'],
        emb_dim=found['emb_dim'],
        num_heads=found['num_heads'],
        num_encoder_layers=found['num_encoder_layers'],
        num_decoder_layers=found['num_decoder_layers'],
        head_dim=found['head_dim'],
        mlp_dim=found['mlp_dim'],
        mlp_activations=('gelu', 'linear'),
      )
    except KeyError as error:
      raise UserError(
        f'no {self.name} model: its tensors do not determine {error}'
      ) from error
    return _network(config)

  def recorded(self, config: json_object.JsonObject) -> Any:
    """See `hugging_face.Family`."""
    return _network(hugging_face.from_record(t5_config.T5Config, config))

  def differing(self, network: Any, stated: Any) -> Collection[str]:
    """See `hugging_face.Family`; shapes tell the rest."""
    ours, theirs = (tuple(x.config.mlp_activations) for x in (network, stated))
    return () if ours == theirs else ('mlp_activations',)

  def sizes(self, params: PyTree) -> dict[str, int]:
    """See `hugging_face.Family`."""
    return sizes.sizes(params)

  def linear_map(self, path: str) -> str:
    """See `hugging_face.Family`."""
    return hf_names.linear_map(path)

  def module_name(self, module: str) -> str:
    """See `hugging_face.Family`; all layer norms have the same name."""
    side, _, part = module.rpartition('/')
    if 'norm' in part:
      return 'layer norms'
    if 'relpos' in part:
      return 'relative position bias'
    if part in _MODULES:
      return _MODULES[part]
    names = {'attention': 'self-attention', 'mlp': 'feed-forward'}
    return ' '.join(filter(None, (side, names.get(part, part))))


def _model(
  config: t5_config.T5Config, num_buckets: int, substitutes: Mapping[str, str]
) -> hugging_face.Model:
  return hugging_face.Model(
    network=_network(config),
    architecture=hf_config.ARCHITECTURE,
    tensors=hf_names.layout(config, num_buckets),
    copies=dict.fromkeys(hf_names.COPIES, hf_names.EMBEDDING),
    substitutes=substitutes,
    unused=hf_names.UNUSED,
  )


def _network(config: t5_config.T5Config) -> Any:
  from dst_t5x.models.t5 import network  # Imports Flax; reports do not need it.

  return network.Transformer(config)
