"""What cannot be a SHiRA adapter, and damaged ones, each in one line."""

import functools
import json
import re

import numpy as np
import pytest
import refusals
from safetensors import numpy as safetensors_numpy
import shira_bases

from dst_t5x import subsets
from dst_t5x.checkpoints import conversion
from dst_t5x.checkpoints import seeds
from dst_t5x.checkpoints import shira_files
from dst_t5x.core import parts

WEIGHTS = 'adapter_model.safetensors'


@pytest.fixture(scope='module')
def bases(tmp_path_factory):
  """Returns a function: family -> its Base."""
  root = tmp_path_factory.mktemp('bases')
  return functools.cache(functools.partial(shira_bases.make, root))


REFUSED = {
  'token_embedder': r'1 other tensors: token_embedder/embedding;',
  'norm/scale': (
    r'15 other tensors: decoder/decoder_norm/scale, '
    r'decoder/layers_\{0,1,2\}/pre_cross_attention_layer_norm/scale, .*'
    r'encoder/layers_\{0,1\}/pre_mlp_layer_norm/scale'
  ),
  'relpos_bias': 'decoder/relpos_bias/rel_embedding, encoder/relpos_bias/rel',
  'layers_1/pre_mlp': r'decoder/layers_\{1\}/pre_mlp_layer_norm/scale, enc',
  '': r'18 other tensors: ',
  'nothing': 'the subset changes nothing',
}


@pytest.mark.parametrize('pattern', REFUSED)
def test_other_tensors_are_refused_with_their_list(pattern, bases, tmp_path):
  base = bases('t5')
  subset = shira_bases.save(
    tmp_path / 'a.dst', shira_bases.tuned(base.seed, pattern), base.seed
  )
  said = refusals.refusal(
    conversion.convert, subset, tmp_path / 'shira', 'peft'
  )
  assert said is not None
  assert re.search(REFUSED[pattern], said), said
  assert not (tmp_path / 'shira').exists()


def test_biases_and_tied_tables_are_refused(bases, tmp_path):
  for family, pattern, message in (
    ('qwen2', 'bias', 'decoder/layers_{0,1}/self_attention/key/bias, '),
    ('gemma3', 'embedding', '1 other tensors: token_embedder/embedding; '),
  ):
    seed = bases(family).seed
    subset = shira_bases.save(
      tmp_path / f'{family}.dst', shira_bases.tuned(seed, pattern), seed
    )
    said = refusals.refusal(conversion.convert, subset, tmp_path / 'x', 'peft')
    assert message in said


def test_a_map_may_be_too_small_for_the_values_of_another(bases, tmp_path):
  seed = bases('gemma3').seed
  whole = 'decoder/layers_0/mlp/wo'
  subset = shira_bases.tuned(seed, whole, share=0.99)
  said = refusals.refusal(
    shira_files.save, tmp_path / 'x', subset, seed.params, seed.reference, 0
  )
  assert f'values of {whole}/kernel need SHiRA with r = 11' in said
  # One of 24 · 16 has room for r = 9 only.
  some = subsets.extract(
    parts.join(
      subsets.apply(
        shira_bases.tuned(seed, 'self_attention/key/'), seed.params
      ),
      {'decoder': {'layers_0': {'mlp': {'wo': {'kernel': _changed(seed)}}}}},
    ),
    seed.params,
  )
  said = refusals.refusal(
    shira_files.save, tmp_path / 'x', some, seed.params, seed.reference, 0
  )
  assert 'need SHiRA with r = 10' in said
  assert 'decoder/layers_0/self_attention/key/kernel of 24 · 16' in said


def _changed(seed):
  """Returns a kernel of 20 · 24 of which 410 components differ."""
  kernel = seed.params['decoder']['layers_0']['mlp']['wo']['kernel'].copy()
  kernel.reshape(-1)[:410] += 1
  return kernel


@pytest.fixture
def saved(bases, tmp_path):
  """A folder of ours, of T5."""
  base = bases('t5')
  subset = shira_bases.save(
    tmp_path / 'a.dst', shira_bases.tuned(base.seed), base.seed
  )
  conversion.convert(subset, tmp_path / 'shira', 'peft')
  return tmp_path / 'shira'


QUERY = 'base_model.model.encoder.block.0.layer.0.SelfAttention.q'


def _set(name, value):
  def change(tensors):
    tensors[f'{QUERY}.{name}'] = value(tensors[f'{QUERY}.{name}'])

  return change


def _put(index, value):
  def change(array):
    array = array.copy()
    array[index] = value
    return array

  return change


DAMAGE = {
  'cut': (None, 'is truncated or damaged'),
  'no_indices': (
    lambda tensors: tensors.pop(f'{QUERY}.shira_indices'),
    f'lacks tensor {QUERY}.shira_indices',
  ),
  'more': (
    lambda tensors: tensors.update({f'{QUERY}.lora_A': np.zeros(3)}),
    f'has no place in its base .*: {QUERY}.lora_A',
  ),
  'short': (_set('shira_weight', lambda x: x[1:]), 'its base and .* ask for'),
  'rows': (_set('shira_indices', lambda x: x[:1]), 'its base and .* ask for'),
  'ints': (
    _set('shira_weight', lambda x: x.astype(np.int32)),
    'shira_weight of .* is I32, not F32',
  ),
  'types': (
    _set('shira_indices', lambda x: x.astype(np.uint8)),
    'shira_indices of .* is U8, not I32, I64, F32',
  ),
  'below': (_set('shira_indices', _put((0, 0), -1)), 'outside of the map'),
  'row': (_set('shira_indices', _put((0, -1), 18)), r'map, which is 18 · 16'),
  'column': (_set('shira_indices', _put((1, 0), 16)), 'outside of the map'),
  'fraction': (
    _set('shira_indices', lambda x: x.astype(np.float32) / 2),
    'outside of the map',
  ),
  'nan_index': (
    _set('shira_indices', lambda x: x.astype(np.float32) * np.nan),
    'outside of the map',
  ),
  'twice': (
    _set('shira_indices', lambda x: np.repeat(x[:, :1], x.shape[1], 1)),
    'a position twice',
  ),
  'nan': (_set('shira_weight', _put(0, np.nan)), r'1 of \d+ values of tensor'),
  'inf': (_set('shira_weight', _put(0, np.inf)), r'1 of \d+ values of tensor'),
}


@pytest.mark.parametrize('name', DAMAGE)
def test_damaged_files_are_one_line(name, saved):
  change, message = DAMAGE[name]
  file = saved / WEIGHTS
  content = file.read_bytes()
  if change is None:
    file.write_bytes(content[:-1])
  else:
    length = int.from_bytes(content[:8], 'little')
    metadata = json.loads(content[8 : 8 + length])['__metadata__']
    tensors = safetensors_numpy.load(content)
    change(tensors)
    tensors = {n: np.ascontiguousarray(x) for n, x in tensors.items()}
    file.write_bytes(safetensors_numpy.save(tensors, metadata))
  said = refusals.refusal(seeds.load_seed, saved)
  assert said is not None
  assert re.search(message, said), said


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'r': 4}, 'shira_weight is (68,), its base and adapter_config.json ask'),
    ({'r': 0}, 'r must be from 1'),
    ({'r': 'x'}, 'r must be a whole number'),
    ({'r': None}, 'ask for (1088,)'),
    ({'fan_in_fan_out': True}, 'fan_in_fan_out = True is not known here'),
    ({'modules_to_save': ['x']}, "modules_to_save = ['x'] is not known here"),
    ({'an_option_of_tomorrow': 1}, 'an_option_of_tomorrow = 1 is not known'),
    ({'target_modules': None}, "lacks 'target_modules'"),
    ({'target_modules': ['x']}, 'fit no linear map'),
    ({'target_modules': ['q']}, 'no place in its base'),
    ({'target_modules': 3}, 'target_modules must be a text or a list'),
    ({'peft_type': 'HIRA'}, 'IA3, LORA, PROMPT_TUNING, SHIRA'),
  ],
)
def test_settings_are_checked(changes, message, saved):
  file = saved / 'adapter_config.json'
  stated = json.loads(file.read_text())
  assert stated['r'] == 2
  file.write_text(json.dumps({**stated, **changes}))
  said = refusals.refusal(seeds.load_seed, saved)
  assert said is not None
  assert message in said
