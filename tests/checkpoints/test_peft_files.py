"""Adapters in PEFT's format, against Hugging Face's peft itself."""

import json
import re
import shutil

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import networks
import numpy as np
import pytest
import refusals
from safetensors import numpy as safetensors_numpy

from dst_t5x.adapters import api as adapters
from dst_t5x.adapters import dora
from dst_t5x.adapters import ia3
from dst_t5x.adapters import lora
from dst_t5x.adapters import pissa
from dst_t5x.adapters import prompts
from dst_t5x.adapters import vera
from dst_t5x.checkpoints import hf_checkpoint
from dst_t5x.checkpoints import peft_files
from dst_t5x.checkpoints import peft_targets
from dst_t5x.checkpoints import seeds
from dst_t5x.core import errors
from dst_t5x.core import json_object
from dst_t5x.core import parts
from dst_t5x.core import stacking
from dst_t5x.models import families
from dst_t5x.subsets import fingerprint

# PEFT says so of every VeRA without its random matrices, such as ours.
pytestmark = pytest.mark.filterwarnings(
  'ignore:Specified to not (save|load) vera_A and vera_B'
)
ALL_FOUR = '.*attention/(key|out|query|value)'
ENCODER = r'encoder/layers(_\d+)?/attention/(query|value)'
ADAPTERS = {
  'query_value': lora.LoRA(rank=3, alpha=6.0, dropout_rate=0.1),
  'all_four': lora.LoRA(rank=2, targets=ALL_FOUR),
  'encoder': lora.LoRA(rank=1, alpha=0.5, targets=ENCODER),
  'rslora': lora.LoRA(rank=3, alpha=6.0, rank_stabilized=True),
  'dora': dora.DoRA(rank=3, alpha=6.0),
  'pissa': pissa.PiSSA(rank=2, alpha=3.0, targets='.*attention/(key|value)'),
  'rank_stabilized_pissa': pissa.PiSSA(rank=2, rank_stabilized=True),
  'vera': vera.VeRA(rank=5, targets='.*/(query|out|wi_0|wo)', projection_key=3),
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
  hf_checkpoint.save(folder, networks.random_params(model), model)
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
  flat, base_flat = parts.flatten(added), parts.flatten(params)
  modules = adapters.modules_of(flat, adapter.added)
  flat |= adapter.fixed_tensors(modules, base_flat)
  peft_files.save(
    folder, adapter, flat, params, _reference(base), 12, **options
  )
  return parts.join(params, added)


def _our_logits(adapter, params, **changes):
  """Returns logits [rows, length, vocabulary] of our network."""
  model = networks.tiny(adapter=adapter, **changes)
  if not model.scan_layers:
    params = networks.with_fixed(model, params)
  prefix = np.array(adapter.prefix(model.vocab_size), np.int32)
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
    ('rslora', ['q', 'v']),
    ('dora', ['q', 'v']),
    ('pissa', ['k', 'v']),
    ('rank_stabilized_pissa', ['q', 'v']),
    ('vera', ['o', 'q', 'wi_0', 'wo']),
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


@pytest.mark.parametrize('name', [x for x in ADAPTERS if 'pissa' not in x])
def test_round_trip_keeps_every_bit(name, base, tmp_path):
  adapter = ADAPTERS[name]
  params = _save(tmp_path / 'adapter', base, adapter)
  seed = seeds.load_seed(tmp_path / 'adapter')
  assert (seed.format, seed.step) == ('peft', 12)
  assert fingerprint.fingerprint(params) == seed.fingerprint
  assert networks.flat(seed.params).keys() == networks.flat(params).keys()
  if name not in ('encoder', 'some', 'vera'):  # Spelt otherwise.
    assert seed.adapter == adapter


@pytest.mark.parametrize('name', ['pissa', 'rank_stabilized_pissa'])
def test_pissa_comes_back_as_a_lora_of_twice_the_rank(name, base, tmp_path):
  adapter = ADAPTERS[name]
  params = _save(tmp_path / 'adapter', base, adapter)
  seed = seeds.load_seed(tmp_path / 'adapter')
  assert type(seed.adapter) is lora.LoRA
  assert seed.adapter.rank == 2 * adapter.rank
  assert np.isclose(seed.adapter.scale, adapter.scale)
  ours = _our_logits(seed.adapter, seed.params)
  np.testing.assert_allclose(ours, _our_logits(adapter, params), atol=1e-4)


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
  'rslora': (
    'LoraConfig',
    {'r': 3, 'lora_alpha': 6, 'use_rslora': True},
    '.*attention/(query|value)',
  ),
  'dora': (
    'LoraConfig',
    {'r': 3, 'lora_alpha': 6, 'use_dora': True, 'use_rslora': True},
    '.*attention/(query|value)',
  ),
  'vera': ('VeraConfig', {'r': 5}, '.*attention/(query|value)'),
  'vera_of_all_sizes': (
    'VeraConfig',
    {
      'r': 20,
      'save_projection': False,
      'projection_prng_key': 2**32 - 1,
      'target_modules': ['q', 'wi_0', 'k', 'wo'],
    },
    '.*/(key|query|wi_0|wo)',
  ),
  'ia3': ('IA3Config', {}, None),
  'prompt': ('PromptTuningConfig', {'num_virtual_tokens': 4}, None),
}


def _peft_folder(name, torch_model, peft, folder):
  """Saves an adapter of PEFT's with random weights; returns its logits."""
  torch = pytest.importorskip('torch')
  # Always the same: some weights saturate a softmax, where sums in another
  # order differ by more than the tolerance.
  random = torch.Generator().manual_seed(0)
  kind, options, _ = PEFTS[name]
  config = getattr(peft, kind)(task_type='SEQ_2_SEQ_LM', **options)
  model = peft.get_peft_model(torch_model, config).eval()
  for parameter in model.parameters():
    if parameter.requires_grad:
      parameter.data.normal_(0.1, 0.3, generator=random)
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


@pytest.mark.parametrize('name', ['encoder', 'ia3', 'dora', 'vera'])
def test_stacked_networks_take_theirs(name, torch_model, peft, tmp_path):
  without = _their_logits(torch_model)
  theirs = _peft_folder(name, torch_model, peft, tmp_path / 'adapter')
  seed = seeds.load_seed(tmp_path / 'adapter')
  unstacked = networks.tiny(adapter=seed.adapter)
  params = networks.with_fixed(unstacked, seed.params)
  params = stacking.stack_layers(params)
  ours = _our_logits(seed.adapter, params, scan_layers=True)
  _assert_same(ours, theirs, without)


def _change(folder, **changes):
  file = folder / 'adapter_config.json'
  file.write_text(json.dumps({**_config(folder), **changes}))


@pytest.mark.parametrize(
  'changes',
  [
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
    ({'r': None}, "adapter_config.json: .* lacks 'r'"),
    ({'lora_alpha': 'much'}, "lora_alpha must be a finite number, it is 'much"),
    ({'lora_alpha': 0}, 'LORA_ALPHA must be above 0 and finite'),
    ({'lora_alpha': 1e300}, 'LORA_ALPHA must be above 0 and finite'),
    ({'lora_alpha': float('inf')}, 'Infinity is no number in JSON'),
    ({'lora_alpha': 10**400}, 'lora_alpha must be a finite number'),
    ({'lora_dropout': 1}, r'LORA_DROPOUT_RATE must be in \[0, 1\)'),
    ({'use_dora': True}, 'lacks tensor .*q.lora_magnitude_vector.*16 missing'),
    ({'use_dora': 'yes'}, "use_dora must be true or false, it is 'yes'"),
    ({'use_rslora': 1}, 'use_rslora must be true or false, it is 1'),
    ({'peft_type': 'VERA'}, r'no place in its base by .*lora_A'),
    ({'target_modules': ['x']}, "target_modules .'x'. fit no linear map"),
    ({'target_modules': '('}, r"target_modules must be a regular expr.*'\('"),
    ({'target_modules': ['q']}, r'no place in its base by .*\.v\.lora_A'),
    ({'target_modules': ['q', 'v', 'o']}, r'lacks tensor .*\.o\.lora_A.*16 m'),
    ({'target_modules': 'all-linear'}, r'lacks tensor .*\.k\.lora_A'),
    ({'exclude_modules': ['v']}, r'no place in its base by .*\.v\.lora_A'),
    ({'layers_to_transform': 1}, r'no place in .*block\.0\..*\.q\.lora_A'),
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


def _renamed(pattern, replacement):
  def change(tensors):
    for name in list(tensors):
      tensors[re.sub(pattern, replacement, name)] = tensors.pop(name)

  return _change_tensors(change)


QUERY = 'base_model.model.encoder.block.0.layer.0.SelfAttention.q'


@pytest.mark.parametrize(
  ('damage', 'message'),
  [
    (_cut, 'adapter_model.safetensors is truncated or damaged'),
    (lambda file: file.unlink(), 'adapter_model.safetensors is missing'),
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
      f'no place in its base .*: {QUERY}.lora_magnitude_vector',
    ),
    (
      _change_tensors(
        lambda tensors: [tensors.pop(n) for n in [*tensors] if '.encoder.' in n]
      ),
      r'lacks tensor .*encoder\.block\.0.* for which .* asks \(8 missing\)',
    ),
    (
      _change_tensors(lambda tensors: tensors.clear()),
      r'lacks tensor .*lora_A.weight, for which .* asks \(32 missing\)',
    ),
    (_renamed(r'^', 'module.'), r"names begin with 'module\.'"),
    (
      _renamed(r'^(base_model\.model\.)', r'\1module.'),
      r"begin with 'module\.'",
    ),
  ],
)
def test_damage_is_named(damage, message, base, tmp_path):
  _save(tmp_path / 'adapter', base, ADAPTERS['query_value'])
  damage(tmp_path / 'adapter' / 'adapter_model.safetensors')
  with pytest.raises(errors.UserError, match=message) as caught:
    seeds.load_seed(tmp_path / 'adapter')
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'r': 4}, r'vera_A is \(5, 16\), its base and .* \(4, 16\)'),
    ({'projection_prng_key': -1}, 'VERA_PROJECTION_KEY must be a whole number'),
    ({'projection_prng_key': 4}, 'vera_A is not what PEFT draws'),
    ({'d_initial': 'x'}, "d_initial must be a finite number, it is 'x'"),
    ({'vera_dropout': 1}, r'LORA_DROPOUT_RATE must be in \[0, 1\)'),
    ({'bias': 'vera_only'}, "bias = 'vera_only' is not known here"),
  ],
)
def test_vera_of_what_makes_no_sense_is_refused(
  changes, message, torch_model, peft, tmp_path
):
  _peft_folder('vera', torch_model, peft, tmp_path / 'adapter')
  _change(
    tmp_path / 'adapter', base_model_name_or_path=torch_model.name_or_path
  )
  _change(tmp_path / 'adapter', **changes)
  with pytest.raises(errors.UserError, match=message) as caught:
    seeds.load_seed(tmp_path / 'adapter')
  assert '\n' not in str(caught.value)


@pytest.mark.filterwarnings('ignore:PiSSA changes the base weights')
def test_peft_s_own_pissa_converted_is_a_lora(
  torch_model, base, peft, tmp_path
):
  torch = pytest.importorskip('torch')
  without = _their_logits(torch_model)
  options = {'r': 2, 'lora_alpha': 3, 'target_modules': ['k', 'v']}
  config = peft.LoraConfig(
    task_type='SEQ_2_SEQ_LM', init_lora_weights='pissa', **options
  )
  model = peft.get_peft_model(torch_model, config).eval()
  # It starts where ours does.
  ours = networks.tiny(adapter=ADAPTERS['pissa'])
  fixed = parts.flatten(
    networks.with_fixed(ours, hf_checkpoint.load(base).params)
  )
  weights = dict(model.named_parameters())
  for layer in range(2):
    module = f'encoder/layers_{layer}/attention/key'
    theirs = [
      weights[
        f'base_model.model.encoder.block.{layer}.layer.0.SelfAttention.k'
        f'.lora_{x}.default.weight'
      ].detach()
      for x in 'BA'
    ]
    product = fixed[f'{module}/pissa_a'] @ fixed[f'{module}/pissa_b']
    expected = (theirs[0] @ theirs[1]).numpy().T
    np.testing.assert_allclose(product, expected, atol=1e-6)
    np.testing.assert_allclose(
      np.abs(fixed[f'{module}/pissa_a']), np.abs(theirs[1].numpy().T), atol=1e-4
    )
  model.peft_config['default'].init_lora_weights = True
  model.save_pretrained(tmp_path / 'initial')
  model.peft_config['default'].init_lora_weights = 'pissa'
  random = torch.Generator().manual_seed(0)
  for parameter in model.parameters():
    if parameter.requires_grad:
      noise = torch.empty_like(parameter).normal_(0.0, 0.3, generator=random)
      parameter.data.add_(noise)
  theirs = _their_logits(model)
  model.save_pretrained(
    tmp_path / 'adapter',
    path_initial_model_for_weight_conversion=str(tmp_path / 'initial'),
  )
  seed = seeds.load_seed(tmp_path / 'adapter', seed_path=str(base))
  assert (type(seed.adapter), seed.adapter.rank) == (lora.LoRA, 4)
  _assert_same(_our_logits(seed.adapter, seed.params), theirs, without)


NAMES = st.sampled_from(
  [
    *('q', 'o', 'wo', 'wi_0', 'SelfAttention.k', 'lm_head', 'encoder', 'x'),
    *('', 'encoder.block.0.layer.0.SelfAttention.v', 'layer.1.o'),
  ]
)
EXPRESSIONS = st.sampled_from(
  [r'.*\.q', r'encoder.*', r'.*block\.1\..*\.(k|wo)', 'q', 'All-Linear', '']
)
MODULES = st.one_of(st.none(), EXPRESSIONS, st.lists(NAMES, max_size=3))
LAYERS = st.one_of(st.none(), st.integers(0, 2), st.lists(st.integers(0, 2)))
PATTERNS = st.sampled_from([None, [], 'block', 'layer', ['x', 'block'], ['x']])


@settings(max_examples=300, deadline=None)
@given(MODULES, MODULES, LAYERS, PATTERNS)
def test_we_adapt_what_peft_adapts(peft, targets, excluded, layers, patterns):
  options = {
    'target_modules': targets,
    'exclude_modules': excluded,
    'layers_to_transform': layers,
    'layers_pattern': patterns,
  }
  try:
    config = peft.LoraConfig(**options)
  except ValueError:  # It does not let all of them go together.
    return
  shapes = parts.flatten(networks.random_params(networks.tiny()))
  known = [p.removesuffix('/kernel') for p in shapes if p.endswith('/kernel')]
  family = families.of_paths(shapes)
  names = {path: family.linear_map(path) for path in known}
  if targets is None:
    config.target_modules = ['q', 'v']  # For a T5.
  if targets == 'All-Linear':
    config.target_modules = '.*(?<!lm_head)'
  check = peft.tuners.tuners_utils.check_target_module_exists
  theirs = {path for path, name in names.items() if check(config, name)}
  stated = json_object.JsonObject({'peft_type': 'LORA', **options}, 'it')
  if theirs:
    assert peft_targets.adapted(stated, family, names, theirs) == theirs
  else:
    adapted = peft_targets.adapted
    said = refusals.refusal(adapted, stated, family, names, theirs)
    assert 'fit no linear map' in said


RIGHT = (
  ('exclude_modules', str),
  ('layers_pattern', str),
  ('lora_alpha', float),
)


@pytest.fixture(scope='module')
def saved(base, tmp_path_factory):
  """A folder with a folder for each of some adapters; treat as read-only."""
  folder = tmp_path_factory.mktemp('saved')
  for name in ('query_value', 'ia3', 'prompt'):
    _save(folder / name, base, ADAPTERS[name])
  return folder


@pytest.mark.parametrize(
  'key',
  [
    *('base_model_name_or_path', 'peft_type', 'target_modules', 'r'),
    *('exclude_modules', 'layers_to_transform', 'layers_pattern'),
    *('lora_alpha', 'lora_dropout', 'bias', 'rank_pattern', 'use_rslora'),
    'use_dora',
  ],
)
def test_wrong_types_are_one_line(key, saved, base, tmp_path):
  folder = shutil.copytree(saved / 'query_value', tmp_path / 'adapter')
  good = _config(folder)
  params = hf_checkpoint.load(base).params
  for value in ([3.5], {'a': 'b'}, -1, 2.5, '\ud800', 10**400, [[]], 'x' * 999):
    _change(folder, **{**good, key: value})
    if key == 'base_model_name_or_path':
      said = refusals.refusal(seeds.load_seed, folder)
    else:
      said = refusals.refusal(peft_files.load, folder, params)
    if said is None:  # A value of the right type, which adapts the same.
      assert (key, type(value)) in RIGHT
    elif not isinstance(value, str | int | float):
      assert f'{key} must be' in said or f'{key} = ' in said


@pytest.mark.parametrize(
  'ours',
  ['', '{', '[]', '{}', '{"seed": 3, "step": 1}', '{"seed": {}, "step": 1}',
   '{"seed": {"path": 3, "fingerprint": "x"}, "step": 1}',
   '{"seed": {"path": "x", "fingerprint": 3}, "step": 1}',
   '{"seed": {"path": "x", "fingerprint": "x", "format": 3}, "step": 1}',
   '{"seed": {"path": "x", "fingerprint": "x"}, "step": "1"}',
   '{"seed": {"path": "x", "fingerprint": "x"}, "step": NaN}'],
)  # fmt: skip
def test_damaged_metadata_are_one_line(ours, saved, tmp_path):
  shutil.copytree(saved / 'ia3', tmp_path / 'adapter')
  file = tmp_path / 'adapter' / 'adapter_model.safetensors'
  tensors = safetensors_numpy.load_file(file)
  file.write_bytes(safetensors_numpy.save(tensors, {'dst_t5x': ours}))
  said = refusals.refusal(seeds.load_seed, tmp_path / 'adapter')
  assert str(tmp_path / 'adapter') in said


@pytest.mark.parametrize('name', ['query_value', 'ia3', 'prompt'])
@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_named(name, value, saved, tmp_path):
  shutil.copytree(saved / name, tmp_path / 'adapter')
  file = tmp_path / 'adapter' / 'adapter_model.safetensors'

  def spoil(tensors):
    min(tensors.items())[1].flat[-1] = value

  _change_tensors(spoil)(file)
  said = refusals.refusal(seeds.load_seed, tmp_path / 'adapter')
  assert re.search(r' 1 of \d+ values of tensor .*/(lora_a|ia3|prompt) ', said)


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
  hf_checkpoint.save(another, other, model)
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
