"""A model file that computes otherwise than its seed states is refused."""

import dataclasses
import re

from decoder_only import FAMILIES
from decoder_only import random_params
from decoder_only import tiny
import pytest
import tiny_t5

from dst_t5x.checkpoints import hf_checkpoint
from dst_t5x.checkpoints import matching
from dst_t5x.checkpoints import seeds
from dst_t5x.core.errors import UserError
from dst_t5x.models.decoder_only import network
from dst_t5x.models.decoder_only import rope
from dst_t5x.models.t5 import network as t5_network

# How a network runs, and what a task may choose.
_FREE = {
  'begin_id': 7,
  'context_length': 64,
  'dropout_rate': 0.5,
  'dtype': 'bfloat16',
  'eos_id': 9,
  'remat': True,
  'scan_layers': True,
}
# Shapes show these, or another class of rotary positions.
_OF_SHAPES = {
  *('emb_dim', 'head_dim', 'logits_via_embedding', 'mlp_dim', 'num_heads'),
  *('num_kv_heads', 'num_layers', 'qkv_biases', 'query_key_norms'),
  *('vocab_size', 'post_norms'),
}
_OTHER = {
  'attention_logit_cap': 7.0,
  'local_layers': (True, False),
  'local_rope': rope.Rope(123.0),
  'logit_cap': 7.0,
  'mlp_activation': 'gelu',
  'norm_adds_one': True,
  'norm_epsilon': 1e-4,
  'query_scalar': 99.0,
  'rope': rope.Rope(123.0),
  'scale_embeddings': True,
  'sliding_window': 3,
}


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """Returns a seed that states its network, of a family."""

  def saved(family):
    model = tiny(family)
    folder = tmp_path_factory.mktemp(family)
    hf_checkpoint.save(folder / 'seed', random_params(model), model)
    return model, seeds.load_seed(folder / 'seed')

  return saved


def test_these_are_all_options():
  fields = {field.name for field in dataclasses.fields(network.DecoderConfig)}
  assert fields == {*_FREE, *_OF_SHAPES, *_OTHER}


@pytest.mark.parametrize('family', FAMILIES)
def test_the_model_file_of_the_seed_is_taken(saved, family):
  model, seed = saved(family)
  matching.check_network(seed, model)
  for changes in _FREE, {'query_scalar': model.config.query_scalar or 8.0}:
    other = dataclasses.replace(model.config, **changes)
    matching.check_network(seed, network.Transformer(other))


@pytest.mark.parametrize('option', _OTHER)
def test_each_option_that_shapes_do_not_show_is_named(saved, option):
  local = option in ('local_rope', 'sliding_window')
  model, seed = saved('gemma3' if local else 'smollm2')
  window = {'sliding_window': 3} if option == 'local_layers' else {}
  changes = {option: _OTHER[option], **window}
  other = dataclasses.replace(model.config, **changes)
  message = re.escape(f' states {option} = ') + '.*choose the model file'
  with pytest.raises(UserError, match=message):
    matching.check_network(seed, network.Transformer(other))


def test_the_activation_of_t5(tmp_path):
  model = t5_network.Transformer(tiny_t5.CONFIG)
  hf_checkpoint.save(tmp_path / 'seed', tiny_t5.random_params(), model)
  seed = seeds.load_seed(tmp_path / 'seed')
  matching.check_network(seed, model)
  other = dataclasses.replace(
    tiny_t5.CONFIG, mlp_activations=('silu', 'linear')
  )
  with pytest.raises(UserError, match='states mlp_activations = '):
    matching.check_network(seed, t5_network.Transformer(other))
