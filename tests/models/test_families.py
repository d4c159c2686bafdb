"""Families of models plug in as data: T5 1.1, and one that only this test has.

Its models are `causal_network.Causal`. Only the class below knows their names
in Hugging Face's format.
"""

import json
import re
from typing import ClassVar

import causal_network
import jax
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy
import tiny_t5

from dst_t5x.adapters import lora
from dst_t5x.checkpoints import conversion
from dst_t5x.checkpoints import hf_checkpoint
from dst_t5x.checkpoints import peft_files
from dst_t5x.checkpoints import peft_targets
from dst_t5x.checkpoints import seeds
from dst_t5x.checkpoints import t5x_checkpoint
from dst_t5x.core import json_object
from dst_t5x.core import parts
from dst_t5x.core.errors import UserError
from dst_t5x.models import adapted
from dst_t5x.models import families
from dst_t5x.models import hugging_face

TABLE, HEAD = 'embed.weight', 'head.weight'


class Toy(hugging_face.Family):
  name = 'Toy'
  model_types = ('toy', 'toy_2')
  task_type = 'CAUSAL_LM'
  default_targets: ClassVar = {'LORA': ['0']}
  head = 'head'

  def has(self, paths):
    return 'table/embedding' in paths

  def read(self, stated):
    network = causal_network.Causal(
      vocab_size=stated.size('vocab'),
      width=stated.size('width'),
      layers=stated.size('layers'),
    )
    is_tied = stated.get('tied', bool, False)
    return self._model(network, {HEAD: TABLE} if is_tied else {})

  def written(self, network, params):
    del params
    sizes = {'width': network.width, 'layers': network.layers}
    stated = {'model_type': 'toy', 'vocab': network.vocab_size, **sizes}
    return self._model(network, {}), stated

  def _model(self, network, substitutes):
    vocab, width = network.vocab_size, network.width
    tensors = {
      TABLE: hugging_face.Tensor('table/embedding', (vocab, width)),
      HEAD: hugging_face.Tensor('output/kernel', (vocab, width), True),
      'head.bias': hugging_face.Tensor('output/bias', (vocab,)),
      'gain': hugging_face.Tensor('gain/gain', (width,)),
    }
    for i in range(network.layers):
      tensors[f'h.{i}.weight'] = hugging_face.Tensor(
        f'layers_{i}/kernel', (width, width), True
      )
      tensors[f'h.{i}.bias'] = hugging_face.Tensor(f'layers_{i}/bias', (width,))
    return hugging_face.Model(
      network,
      'ToyForCausalLM',
      tensors,
      copies={'tokens.weight': TABLE},
      substitutes=substitutes,
      unused=re.compile(r'h\.\d+\.mask'),
    )

  def network_of(self, params):
    flat = parts.flatten(params)
    vocab, width = flat['table/embedding'].shape
    layers = sum(path.startswith('layers_') for path in flat) // 2
    return causal_network.Causal(vocab, width, layers)

  def linear_map(self, path):
    is_layer = path.startswith('layers_')
    return f'h.{path.removeprefix("layers_")}' if is_layer else 'head'


@pytest.fixture(autouse=True)
def toy(monkeypatch):
  known = (*families.FAMILIES[:1], Toy())
  monkeypatch.setattr(families, 'FAMILIES', known)


@pytest.fixture
def params():
  random = causal_network.random_params()
  return jax.tree.map(np.asarray, random)


def _changed(folder, tensors=None, **stated):
  """Changes files of a folder; a tensor of None is removed."""
  file = folder / 'config.json'
  file.write_text(json.dumps(json.loads(file.read_text()) | stated))
  weights = folder / 'model.safetensors'
  found = safetensors_numpy.load_file(weights) | (tensors or {})
  there = {name: x for name, x in found.items() if x is not None}
  safetensors_numpy.save_file(there, weights)


def test_it_is_converted_there_and_back(params, tmp_path):
  t5x_checkpoint.save(tmp_path / 'there', params, 3)
  conversion.convert(tmp_path / 'there', tmp_path / 'hf', 'hf')
  stated = json.loads((tmp_path / 'hf' / 'config.json').read_text())
  assert stated['model_type'] == 'toy'
  model = hf_checkpoint.model_of(tmp_path / 'hf')
  assert model.network == causal_network.Causal()
  kernel = safetensors_numpy.load_file(tmp_path / 'hf' / 'model.safetensors')
  np.testing.assert_array_equal(kernel[HEAD].T, params['output']['kernel'])
  conversion.convert(tmp_path / 'hf', tmp_path / 'back', 't5x')
  found = seeds.load_seed(tmp_path / 'back').params
  tiny_t5.assert_same_bits(found, params)


def test_copies_substitutes_and_what_nobody_reads(params, tmp_path):
  hf_checkpoint.save(tmp_path / 'm', params, causal_network.Causal())
  table = params['table']['embedding']
  _changed(
    tmp_path / 'm',
    {TABLE: None, 'tokens.weight': table, 'h.0.mask': np.ones(2), HEAD: None},
    tied=True,
    model_type='toy_2',
  )
  found = hf_checkpoint.load(tmp_path / 'm').params
  np.testing.assert_array_equal(found['table']['embedding'], table)
  np.testing.assert_array_equal(found['output']['kernel'], table.T)
  _changed(tmp_path / 'm', tied=False)
  with pytest.raises(UserError, match=r'lacks tensor head\.weight'):
    hf_checkpoint.load(tmp_path / 'm')
  _changed(tmp_path / 'm', {TABLE: table + 1})
  with pytest.raises(UserError, match=r'tokens\.weight differs from embed'):
    hf_checkpoint.load(tmp_path / 'm')
  _changed(tmp_path / 'm', {TABLE: table, 'h.0.masks': np.ones(2)})
  with pytest.raises(UserError, match=r'ToyForCausalLM .* h\.0\.masks'):
    hf_checkpoint.load(tmp_path / 'm')


def test_its_adapters_have_its_names(params, tmp_path):
  hf_checkpoint.save(tmp_path / 'm', params, causal_network.Causal())
  adapter = lora.LoRA(rank=2, targets='layers_0|output')
  network = adapted.with_adapter(causal_network.Causal(), adapter)
  random = network.initialize(jax.random.key(1))['params']
  added, _ = parts.split(random, [adapter.added])
  seed = seeds.load_seed(tmp_path / 'm').reference
  flat = parts.flatten(jax.tree.map(np.asarray, added))
  peft_files.save(tmp_path / 'a', adapter, flat, params, seed, 7)
  stated = json.loads((tmp_path / 'a' / 'adapter_config.json').read_text())
  assert stated['task_type'] == 'CAUSAL_LM'
  assert stated['target_modules'] == ['0', 'head']
  names = safetensors_numpy.load_file(
    tmp_path / 'a' / 'adapter_model.safetensors'
  )
  assert set(names) == {
    f'base_model.model.{module}.lora_{x}.weight'
    for module in ('h.0', 'head')
    for x in 'AB'
  }
  found = seeds.load_seed(tmp_path / 'a')
  for path, tensor in flat.items():
    np.testing.assert_array_equal(parts.flatten(found.params)[path], tensor)
  # What the family adapts where nothing is named, and all but its head.
  known = {path: Toy().linear_map(path) for path in ('layers_0', 'output')}
  for targets, wanted in ((None, {'layers_0'}), ('all-linear', {'layers_0'})):
    it = {'peft_type': 'LORA', 'target_modules': targets}
    stated = json_object.JsonObject(it, 'it')
    assert peft_targets.adapted(stated, Toy(), known, wanted) == wanted


def test_a_config_of_no_family_names_those_that_there_are(tmp_path):
  (tmp_path / 'config.json').write_text('{"model_type": ["t5"]}')
  with pytest.raises(UserError) as caught:
    hf_checkpoint.load(tmp_path)
  assert str(caught.value) == (
    f'{tmp_path} is no T5 1.1 or Toy model: its config.json has model_type'
    " ['t5'], not 't5' or 'mt5' or 'toy' or 'toy_2'"
  )


def test_parameters_tell_their_family():
  assert families.of(tiny_t5.shapes()).name == 'T5 1.1'
  assert families.of_paths(['table/embedding']).name == 'Toy'
  other = families.of_paths(['a/layers_0/b/kernel'])
  assert other.linear_map('a/layers_0/b') == 'a.layers_0.b'
  assert other.module_name('a/b') == 'a/b'
  with pytest.raises(UserError, match=r'no T5 1\.1 or Toy'):
    families.network_of({'w': np.ones(3)})
