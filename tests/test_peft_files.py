"""Adapters in PEFT's format, against Hugging Face's peft itself."""

import json

import networks
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from dst_t5x import adapters
from dst_t5x import errors
from dst_t5x import fingerprint
from dst_t5x import hf_checkpoint
from dst_t5x import ia3
from dst_t5x import lora
from dst_t5x import parts
from dst_t5x import peft_files
from dst_t5x import prompts
from dst_t5x import seeds
from dst_t5x import stacking

ALL_FOUR = '.*attention/(key|out|query|value)'
ENCODER = r'encoder/layers(_\d+)?/attention/(query|value)'
ADAPTERS = {
  'query_value': lora.LoRA(rank=3, alpha=6.0, dropout_rate=0.1),
  'all_four': lora.LoRA(rank=2, targets=ALL_FOUR),
  'encoder': lora.LoRA(rank=1, alpha=0.5, targets=ENCODER),
  'some': lora.LoRA(rank=2, targets='.*layers_1/(attention/out|mlp/.*)'),
  'ia3': ia3.IA3(),
  'prompt': prompts.Prompt(length=4),
}
BATCH = networks.random_batch(3, 7, 5)


@pytest.fixture(scope='module')
def peft():
  return pytest.importorskip('peft')


@pytest.fixture(scope='module')
def base(tmp_path_factory):
  """The folder of a random T5 1.1, and its parameters."""
  model = networks.tiny()
  folder = tmp_path_factory.mktemp('base') / 'model'
  hf_checkpoint.save(folder, networks.random_params(model), model.config)
  return folder


@pytest.fixture
def torch_model(base):
  """That T5, in transformers; peft changes it."""
  transformers = pytest.importorskip('transformers')
  return transformers.T5ForConditionalGeneration.from_pretrained(base).eval()


def _reference(base):
  params = hf_checkpoint.load(base).params
  return {
    'path': str(base),
    'format': 'hf',
    'step': 0,
    'fingerprint': fingerprint.fingerprint(params),
  }


def _save(folder, base, adapter, **options):
  """Saves an adapter with random parameters; returns all of the network's."""
  random = networks.random_params(networks.tiny(adapter=adapter), seed=1)
  params = hf_checkpoint.load(base).params
  added, _ = parts.split(random, [adapter.added])
  flat = parts.flatten(added)
  peft_files.save(
    folder, adapter, flat, params, _reference(base), 12, **options
  )
  return parts.join(params, added)


def _our_logits(adapter, params, **changes):
  """Returns logits [rows, length, vocabulary] of our network."""
  model = networks.tiny(adapter=adapter, **changes)
  prefix = np.array(adapters.prefix(model), np.int32)
  tokens = BATCH['encoder_input_tokens']
  prefixes = np.tile(prefix, (len(tokens), 1))
  batch = {**BATCH, 'encoder_input_tokens': np.hstack([prefixes, tokens])}
  return networks.logits(model, params, batch)


def _their_logits(model):
  """Returns the same of a model in torch, which it does not train."""
  torch = pytest.importorskip('torch')
  tokens = torch.from_numpy(BATCH['encoder_input_tokens']).long()
  decoder = torch.from_numpy(BATCH['decoder_input_tokens']).long()
  with torch.no_grad():
    return model(
      input_ids=tokens, attention_mask=(tokens > 0).long(),
      decoder_input_ids=decoder,
    ).logits.numpy()  # fmt: skip


def _assert_same(ours, theirs, without):
  """Compares logits where there are targets, also to those of the base."""
  real = BATCH['decoder_target_tokens'] > 0
  np.testing.assert_allclose(ours[real], theirs[real], atol=1e-4)
  assert np.abs(ours[real] - without[real]).max() > 0.05


def _config(folder):
  return json.loads((folder / 'adapter_config.json').read_text())


@pytest.mark.parametrize(
  ('name', 'targets'),
  [
    ('query_value', ['q', 'v']),
    ('all_four', ['k', 'o', 'q', 'v']),
    (
      'encoder',
      [
        f'encoder.block.{layer}.layer.0.SelfAttention.{name}'
        for layer in range(2)
        for name in 'qv'
      ],
    ),
    (
      'some',
      [
        'decoder.block.1.layer.2.DenseReluDense.wi_0',
        'decoder.block.1.layer.2.DenseReluDense.wi_1',
        'decoder.block.1.layer.2.DenseReluDense.wo',
        'encoder.block.1.layer.0.SelfAttention.o',
        'encoder.block.1.layer.1.DenseReluDense.wi_0',
        'encoder.block.1.layer.1.DenseReluDense.wi_1',
        'encoder.block.1.layer.1.DenseReluDense.wo',
      ],
    ),
    ('ia3', ['k', 'v', 'wo']),
    ('prompt', None),
  ],
)
def test_peft_computes_the_same_of_ours(
  name, targets, base, torch_model, peft, tmp_path
):
  adapter = ADAPTERS[name]
  without = _their_logits(torch_model)
  params = _save(tmp_path / 'adapter', base, adapter)
  assert _config(tmp_path / 'adapter').get('target_modules') == targets
  model = peft.PeftModel.from_pretrained(torch_model, tmp_path / 'adapter')
  ours = _our_logits(adapter, params)
  _assert_same(ours, _their_logits(model.eval()), without)


@pytest.mark.parametrize('name', ADAPTERS)
def test_round_trip_keeps_every_bit(name, base, tmp_path):
  adapter = ADAPTERS[name]
  params = _save(tmp_path / 'adapter', base, adapter)
  seed = seeds.load_seed(tmp_path / 'adapter')
  assert (seed.format, seed.step) == ('peft', 12)
  assert fingerprint.fingerprint(params) == seed.fingerprint
  assert networks.flat(seed.params).keys() == networks.flat(params).keys()
  if name not in ('encoder', 'some'):  # Spelt otherwise.
    assert seed.adapter == adapter


PEFTS = {
  'default': (
    'LoraConfig',
    {'r': 3, 'lora_alpha': 6},
    '.*attention/(query|value)',
  ),
  'encoder': (
    'LoraConfig',
    {'r': 2, 'target_modules': r'encoder\..*\.(k|wo)'},
    r'encoder/layers(_\d+)?/attention/key|encoder/layers(_\d+)?/mlp/wo',
  ),
  'feed_forward': (
    'LoraConfig',
    {'r': 2, 'target_modules': ['q', 'wi_0', 'k', 'v', 'o']},
    '.*/(key|out|query|value|wi_0)',
  ),
  'a_layer': (
    'LoraConfig',
    {'r': 2, 'target_modules': ['o'], 'layers_to_transform': [1]},
    'decoder/layers_1/encoder_decoder_attention/out|'
    'decoder/layers_1/self_attention/out|encoder/layers_1/attention/out',
  ),
  'ia3': ('IA3Config', {}, None),
  'prompt': ('PromptTuningConfig', {'num_virtual_tokens': 4}, None),
}


def _peft_folder(name, torch_model, peft, folder):
  """Saves an adapter of PEFT's with random weights; returns its logits."""
  kind, options, _ = PEFTS[name]
  config = getattr(peft, kind)(task_type='SEQ_2_SEQ_LM', **options)
  model = peft.get_peft_model(torch_model, config).eval()
  for parameter in model.parameters():
    if parameter.requires_grad:
      parameter.data.normal_(0.1, 0.3)
  model.save_pretrained(folder)
  return _their_logits(model)


@pytest.mark.parametrize('name', PEFTS)
def test_we_compute_the_same_of_theirs(name, torch_model, peft, tmp_path):
  without = _their_logits(torch_model)
  theirs = _peft_folder(name, torch_model, peft, tmp_path / 'adapter')
  seed = seeds.load_seed(tmp_path / 'adapter')
  assert getattr(seed.adapter, 'targets', None) == PEFTS[name][2]
  _assert_same(_our_logits(seed.adapter, seed.params), theirs, without)
  if name != 'prompt':
    merged = seed.merged()
    ours = _our_logits(merged.adapter, merged.params)
    _assert_same(ours, theirs, without)


@pytest.mark.parametrize('name', ['encoder', 'ia3'])
def test_stacked_networks_take_theirs(name, torch_model, peft, tmp_path):
  without = _their_logits(torch_model)
  theirs = _peft_folder(name, torch_model, peft, tmp_path / 'adapter')
  seed = seeds.load_seed(tmp_path / 'adapter')
  params = stacking.stack_layers(seed.params)
  ours = _our_logits(seed.adapter, params, scan_layers=True)
  _assert_same(ours, theirs, without)


def _change(folder, **changes):
  file = folder / 'adapter_config.json'
  file.write_text(json.dumps({**_config(folder), **changes}))


@pytest.mark.parametrize(
  'changes',
  [
    {'use_rslora': True},
    {'use_dora': True},
    {'rank_pattern': {'q': 4}},
    {'alpha_pattern': {'q': 4}},
    {'bias': 'lora_only'},
    {'lora_bias': True},
    {'modules_to_save': ['lm_head']},
    {'fan_in_fan_out': True},
    {'init_lora_weights': 'pissa'},
    {'layer_replication': [[0, 2]]},
    {'trainable_token_indices': [3]},
    {'an_option_of_tomorrow': 1},
  ],
)
def test_options_that_we_lack_are_refused(changes, base, tmp_path):
  folder = tmp_path / 'adapter'
  _save(folder, base, ADAPTERS['query_value'])
  _change(folder, **changes)
  (name, value), *_ = changes.items()
  with pytest.raises(errors.UserError) as caught:
    seeds.load_seed(folder)
  assert f'{name} = {value!r} is not known here' in str(caught.value)
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'r': 4}, r'lora_A.weight is \(3, 16\), its base and .* \(4, 16\)'),
    ({'r': None}, 'LORA_RANK must be a positive whole number'),
    ({'lora_alpha': 'much'}, 'adapter_config.json: it makes no sense'),
    ({'peft_type': 'ADALORA'}, "peft_type 'ADALORA' is not known here"),
    ({'peft_type': 'PROMPT_TUNING'}, "lacks 'num_virtual_tokens'"),
    ({'peft_type': 'IA3'}, 'of all k, v and wo, and only these'),
    ({'base_model_name_or_path': 'google/t5'}, "'google/t5', is no folder"),
    ({'base_model_name_or_path': None}, "'', is no folder: set INITIAL_CH"),
  ],
)
def test_what_makes_no_sense_is_refused(changes, message, base, tmp_path):
  _save(tmp_path / 'adapter', base, ADAPTERS['query_value'])
  _change(tmp_path / 'adapter', **changes)
  with pytest.raises(errors.UserError, match=message) as caught:
    seeds.load_seed(tmp_path / 'adapter')
  assert '\n' not in str(caught.value)


def _cut(file):
  file.write_bytes(file.read_bytes()[:-1])


def _change_tensors(change):
  def of_file(file):
    tensors = dict(safetensors_numpy.load_file(file))
    change(tensors)
    file.write_bytes(safetensors_numpy.save(tensors))

  return of_file


QUERY = 'base_model.model.encoder.block.0.layer.0.SelfAttention.q'


@pytest.mark.parametrize(
  ('damage', 'message'),
  [
    (_cut, 'adapter_model.safetensors is truncated or damaged'),
    (lambda file: file.unlink(), 'adapter_model.safetensors is truncated or'),
    (
      lambda file: file.rename(file.with_name('adapter_model.bin')),
      'has only adapter_model.bin, a pickle',
    ),
    (
      lambda file: file.with_name('adapter_config.json').write_text('{'),
      'cannot read .*adapter_config.json',
    ),
    (
      _change_tensors(lambda tensors: tensors.pop(f'{QUERY}.lora_B.weight')),
      f'lacks tensor {QUERY}.lora_B.weight',
    ),
    (
      _change_tensors(
        lambda tensors: tensors.update(
          {f'{QUERY}.lora_magnitude_vector': np.ones(18, np.float32)}
        )
      ),
      f'no place in its base: {QUERY}.lora_magnitude_vector',
    ),
  ],
)
def test_damage_is_named(damage, message, base, tmp_path):
  _save(tmp_path / 'adapter', base, ADAPTERS['query_value'])
  damage(tmp_path / 'adapter' / 'adapter_model.safetensors')
  with pytest.raises(errors.UserError, match=message) as caught:
    seeds.load_seed(tmp_path / 'adapter')
  assert '\n' not in str(caught.value)


def test_the_base_may_have_moved_but_is_the_same(base, tmp_path):
  folder = tmp_path / 'adapter'
  params = _save(folder, base, ADAPTERS['ia3'])
  _change(folder, base_model_name_or_path='google/t5-v1_1-small')
  seed = seeds.load_seed(folder, seed_path=str(base))
  assert seed.fingerprint == fingerprint.fingerprint(params)
  with pytest.raises(errors.UserError, match='cannot be its own base'):
    seeds.load_seed(folder, seed_path=str(folder))
  another = tmp_path / 'another'
  model = networks.tiny()
  other = networks.random_params(model, seed=5)
  hf_checkpoint.save(another, other, model.config)
  with pytest.raises(errors.UserError, match='is not the seed of the adapter'):
    seeds.load_seed(folder, seed_path=str(another))


def test_the_place_of_another_is_taken_only_on_demand(base, tmp_path):
  folder = tmp_path / 'adapter'
  _save(folder, base, ADAPTERS['ia3'])
  with pytest.raises(errors.UserError, match='exists already'):
    _save(folder, base, ADAPTERS['prompt'])
  assert _config(folder)['peft_type'] == 'IA3'
  _save(folder, base, ADAPTERS['prompt'], replace=True)
  assert _config(folder)['peft_type'] == 'PROMPT_TUNING'
  assert [path.name for path in tmp_path.iterdir()] == ['adapter']
