"""The config.json of decoder-only models, compared with transformers."""

import dataclasses
import inspect
import json
import re

import decoder_only
from decoder_only import FAMILIES
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import numpy as np
import pytest
import refusals

from dst_t5x.core import errors
from dst_t5x.models.decoder_only import hf_config
from dst_t5x.models.decoder_only import hf_families
from dst_t5x.models.decoder_only import hf_names
from dst_t5x.models.decoder_only import network

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

TOKENS = np.random.default_rng(0).integers(2, 60, (2, 11), np.int32)


def _content(family, **changes):
  content = hf_config.config_to_hf(decoder_only.tiny(family).config)
  return {**json.loads(json.dumps(content)), **changes}


def _their_logits(family, content):
  """Returns transformers' logits for a config.json."""
  config = transformers.AutoConfig.for_model(**content)
  config._attn_implementation = 'eager'
  other = transformers.AutoModelForCausalLM.from_config(config).eval()
  model, params, _ = decoder_only.pair(family)
  decoder_only.copy_weights(other, hf_names.layout(model.config), params)
  with torch.no_grad():
    return other(torch.from_numpy(TOKENS).long()).logits.numpy()


def _our_logits(family, content):
  model = network.Transformer(hf_config.config_from_hf(content))
  _, params, _ = decoder_only.pair(family)
  return np.asarray(model.logits(params, {'decoder_input_tokens': TOKENS}))


@pytest.mark.parametrize('family', FAMILIES)
def test_a_config_comes_back(family):
  config = decoder_only.tiny(family).config
  content = json.loads(json.dumps(hf_config.config_to_hf(config)))
  back = hf_config.config_from_hf(content)
  assert hf_config.config_to_hf(back) == content
  assert back.kinds == config.kinds
  assert back.is_local == config.is_local
  same = ('local_layers', 'local_rope', 'query_scalar', 'sliding_window')
  for name in (field.name for field in dataclasses.fields(config)):
    if name not in same:
      assert getattr(back, name) == getattr(config, name), name


@pytest.mark.parametrize('family', FAMILIES)
def test_what_transformers_5_writes_is_read(family):
  content = _content(family)
  written = transformers.AutoConfig.for_model(**content).to_dict()
  assert 'rope_theta' not in written
  read = hf_config.config_from_hf(written)
  assert read == hf_config.config_from_hf(content)


def _keys(family):
  """Returns all keys that transformers writes, accepts, or computes with."""
  content = _content(family)
  config = type(transformers.AutoConfig.for_model(**content))
  model = transformers.AutoModelForCausalLM._model_mapping[config]
  source = inspect.getsource(inspect.getmodule(model))
  return sorted(
    set(content)
    | set(config().to_dict())
    | set(re.findall(r'config\.([a-z]\w+)', source))
    | set(hf_config._FIXED)
    | {'rope_scaling', 'sliding_window_pattern'}
  )


def _rope(kind, **entries):
  return {'rope_type': kind, **entries}


VALUES = st.one_of(
  st.none(),
  st.booleans(),
  st.integers(-2, 20),
  st.sampled_from([24, 48, 60, 128, 0.0, 0.5, 1.0, 1e-6, 1e-5, 2.5, 1e4]),
  st.sampled_from(['relu', 'gelu', 'gelu_new', 'gelu_pytorch_tanh', 'silu']),
  st.sampled_from(['full_attention', 'x', 'gemma', 'llama', 'qwen3']),
  st.sampled_from([[], {}, [1], [7, 3], {'0': [1]}]),
  st.sampled_from([['full_attention'] * 2, ['sliding_attention'] * 2]),
  st.sampled_from(
    [
      _rope('linear', factor=2.0),
      _rope('linear'),
      _rope('default', rope_theta=100.0),
      _rope('yarn', factor=2.0, original_max_position_embeddings=8),
      {'type': 'dynamic', 'factor': 2.0},
      _rope(
        'llama3',
        factor=4.0,
        low_freq_factor=1.0,
        high_freq_factor=3.0,
        original_max_position_embeddings=16,
      ),
      {'full_attention': _rope('linear', factor=3.0)},
    ]
  ),
)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data())
@pytest.mark.parametrize('family', FAMILIES)
def test_what_is_not_refused_is_computed_alike(family, data):
  keys = st.sampled_from(_keys(family))
  changes = data.draw(st.dictionaries(keys, VALUES, min_size=1, max_size=2))
  content = _content(family, **changes)
  said = refusals.refusal(hf_config.config_from_hf, content)
  if said is not None:
    assert any(key in said for key in changes) or 'RoPE' in said, said
    return
  try:
    theirs = _their_logits(family, content)
  except Exception:  # Refused, by one of many kinds of errors.
    return
  np.testing.assert_allclose(_our_logits(family, content), theirs, atol=1e-4)


@pytest.mark.parametrize(
  ('family', 'changes', 'message'),
  [
    ('llama3', {'model_type': 'mixtral'}, 'model_type must be one of gemma,'),
    ('llama3', {'num_local_experts': 8}, 'has num_local_experts 8'),
    ('qwen3', {'num_experts': 8}, 'has num_experts 8'),
    ('llama3', {'partial_rotary_factor': 0.5}, 'partial_rotary_factor 0.5'),
    ('llama3', {'attention_bias': True}, 'attention_bias True, not False'),
    ('llama3', {'mlp_bias': True}, 'mlp_bias True, not False'),
    ('llama3', {'sliding_window': 8}, 'sliding_window 8, which is not known'),
    ('llama3', {'hidden_act': 'relu'}, 'hidden_act must be one of silu'),
    ('qwen2', {'num_key_value_heads': 3}, 'must divide num_attention_heads, 4'),
    ('gemma', {'use_bidirectional_attention': True}, 'use_bidirectional'),
    ('gemma2', {'layer_types': ['full_attention']}, 'must have 2 entries'),
    ('gemma2', {'sliding_window': None}, 'sliding_window must be a number'),
    ('gemma3', {'layer_types': ['chunked_attention'] * 3}, 'layer_types must'),
    (
      'llama3',
      {'rope_scaling': {'rope_type': 'yarn', 'factor': 2.0}},
      "rope_type must be default, linear or llama3, it is 'yarn'",
    ),
    ('qwen2', {'eos_token_id': None}, "lacks 'eos_token_id'"),
    ('smollm2', {'quantization_config': {'bits': 4}}, 'quantization_config'),
  ],
)
def test_what_we_lack_is_refused_by_name(family, changes, message):
  content = _content(family, **changes)
  with pytest.raises(errors.UserError, match=re.escape(message)) as caught:
    hf_config.config_from_hf(content, 'model/config.json')
  assert 'model/config.json' in str(caught.value)
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
  'changes',
  [
    {'qkv_biases': True, 'query_key_norms': True},
    {'norm_adds_one': True},
    {'attention_logit_cap': 3.0},
    {'query_scalar': 3.0},
    {'local_layers': (True, False), 'sliding_window': 3},
  ],
)
def test_what_no_family_has_is_not_written(changes):
  config = decoder_only.tiny('llama3', **changes).config
  with pytest.raises(errors.UserError, match='|'.join(changes)) as caught:
    hf_config.config_to_hf(config)
  assert '\n' not in str(caught.value)


def test_several_end_tokens():
  content = _content('llama3', eos_token_id=[5, 6])
  assert hf_config.config_from_hf(content).eos_id == 5


@pytest.mark.parametrize('family', FAMILIES)
def test_linear_maps_have_their_names(family):
  config = decoder_only.tiny(family).config
  for name, tensor in hf_names.layout(config).items():
    if tensor.transposed:
      module = tensor.path.removesuffix('/kernel')
      assert f'{hf_names.linear_map(module)}.weight' == name


def test_every_family_is_tested():
  types = {_content(family)['model_type'] for family in FAMILIES}
  assert types == hf_families.FAMILIES.keys()
