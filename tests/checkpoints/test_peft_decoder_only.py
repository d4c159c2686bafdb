"""Adapters of decoder-only models in PEFT's format, against peft itself."""

import json

import decoder_only
import numpy as np
import pytest

from dst_t5x.adapters import api as adapters
from dst_t5x.adapters import dora
from dst_t5x.adapters import ia3
from dst_t5x.adapters import lora
from dst_t5x.adapters import pissa
from dst_t5x.adapters import prompts
from dst_t5x.adapters import vera
from dst_t5x.checkpoints import hf_checkpoint
from dst_t5x.checkpoints import peft_files
from dst_t5x.checkpoints import seeds
from dst_t5x.core import errors
from dst_t5x.core import parts
from dst_t5x.engine import parameters
from dst_t5x.models import adapted
from dst_t5x.models import api
from dst_t5x.subsets import fingerprint

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
peft = pytest.importorskip('peft')

# PEFT says so of every VeRA without its random matrices, such as ours.
pytestmark = pytest.mark.filterwarnings(
  'ignore:Specified to not (save|load) vera_A and vera_B'
)
TOKENS = np.random.default_rng(0).integers(2, decoder_only.VOCAB, (3, 11))
ALL_FOUR = '.*attention/(key|out|query|value)'
_PROJECTIONS = ['k_proj', 'o_proj', 'q_proj', 'v_proj']
_VERA = ['down_proj', 'q_proj', 'v_proj']
_MLP = ['down_proj', 'gate_proj', 'up_proj']
ADAPTERS = {
  'query_value': (lora.LoRA(rank=3, alpha=6.0), ['q_proj', 'v_proj']),
  'all_four': (lora.LoRA(rank=2, targets=ALL_FOUR), _PROJECTIONS),
  'a_layer': (
    lora.LoRA(rank=2, targets='.*layers_1/(self_attention/out|mlp/wo)'),
    ['model.layers.1.mlp.down_proj', 'model.layers.1.self_attn.o_proj'],
  ),
  'rslora': (
    lora.LoRA(rank=3, alpha=6.0, rank_stabilized=True),
    ['q_proj', 'v_proj'],
  ),
  'dora': (dora.DoRA(rank=2, targets=ALL_FOUR), _PROJECTIONS),
  'pissa': (pissa.PiSSA(rank=2, targets=ALL_FOUR), _PROJECTIONS),
  'vera': (vera.VeRA(rank=5, targets='.*/(query|value|wo)'), _VERA),
  'ia3': (ia3.IA3(), ['down_proj', 'k_proj', 'v_proj']),
  'prompt': (prompts.Prompt(length=4), None),
}
CASES = [
  *(('gemma3', name) for name in ADAPTERS),
  ('llama3', 'all_four'),
  ('llama3', 'prompt'),
  *(('llama3', name) for name in ('rslora', 'dora', 'pissa', 'vera')),
  ('qwen2', 'all_four'),
  *(('qwen2', name) for name in ('ia3', 'dora', 'pissa', 'vera')),
  ('qwen3', 'query_value'),
]


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
  """Returns a function: the Hugging Face folder of a family's network."""
  root = tmp_path_factory.mktemp('bases')

  def folder(family):
    if not (root / family).exists():
      model, params, _ = decoder_only.pair(family)
      hf_checkpoint.save(root / family, params, model)
    return root / family

  return folder


def _their_model(folder):
  return transformers.AutoModelForCausalLM.from_pretrained(
    folder, attn_implementation='eager'
  ).eval()


def _their_logits(model):
  with torch.no_grad():
    return model(input_ids=torch.from_numpy(TOKENS)).logits.numpy()


def _our_logits(family, adapter, params):
  """Returns logits [rows, length, vocab], those of a prompt included."""
  base = decoder_only.tiny(family)
  model = adapted.with_adapter(base, adapter)
  prefix = np.array(adapter.prefix(base.vocab_size), np.int64)
  params = parameters.with_fixed(model, api.shapes(model), params)
  rows = np.hstack([np.tile(prefix, (len(TOKENS), 1)), TOKENS])
  batch = {'decoder_input_tokens': rows.astype(np.int32)}
  return np.asarray(model.logits(params, batch))


def _save(folder, base, family, adapter):
  """Saves an adapter with random parameters; returns all of the network's."""
  params = hf_checkpoint.load(base).params
  shapes = api.shapes(adapted.with_adapter(decoder_only.tiny(family), adapter))
  added, _ = parts.split(shapes, [adapter.added])
  random = np.random.default_rng(1)
  flat = {
    path: random.normal(0.1, 0.3, x.shape).astype(np.float32)
    for path, x in sorted(parts.flatten(added).items())
  }
  modules = adapters.modules_of(flat, adapter.added)
  fixed = adapter.fixed_tensors(modules, parts.flatten(params))
  reference = {
    'path': str(base),
    'format': 'hf',
    'step': 0,
    'fingerprint': fingerprint.fingerprint(params),
  }
  peft_files.save(folder, adapter, flat | fixed, params, reference, 12)
  return parts.join(params, parts.unflatten(flat))


def _assert_same(ours, theirs, without):
  np.testing.assert_allclose(ours, theirs, atol=1e-4)
  assert np.abs(ours[:, -TOKENS.shape[1] :] - without).max() > 0.05


@pytest.mark.parametrize(('family', 'name'), CASES)
def test_peft_computes_the_same_of_ours(family, name, folders, tmp_path):
  adapter, targets = ADAPTERS[name]
  base = folders(family)
  params = _save(tmp_path / 'adapter', base, family, adapter)
  stated = json.loads((tmp_path / 'adapter/adapter_config.json').read_text())
  assert stated.get('target_modules') == targets
  assert stated['task_type'] == 'CAUSAL_LM'
  model = _their_model(base)
  without = _their_logits(model)
  model = peft.PeftModel.from_pretrained(model, tmp_path / 'adapter').eval()
  theirs = _their_logits(model)
  _assert_same(_our_logits(family, adapter, params), theirs, without)
  # And back, bit for bit; PiSSA as a LoRA.
  seed = seeds.load_seed(tmp_path / 'adapter')
  assert (seed.format, seed.step) == ('peft', 12)
  back, sent = map(fingerprint.fingerprint, (seed.params, params))
  assert (back == sent) == (name != 'pissa')
  if name != 'prompt':
    merged = seed.merged()
    ours = _our_logits(family, merged.adapter, merged.params)
    _assert_same(ours, theirs, without)


PEFTS = {
  'default': ('gemma3', 'LoraConfig', {'r': 3, 'lora_alpha': 6}),
  'qwen3': ('qwen3', 'LoraConfig', {'r': 2}),
  'rslora': ('qwen3', 'LoraConfig', {'r': 2, 'use_rslora': True}),
  'dora': (
    'qwen2',
    'LoraConfig',
    {'use_dora': True, 'target_modules': _PROJECTIONS + _MLP},
  ),
  'dora_head': (
    'llama3',
    'LoraConfig',
    {'use_dora': True, 'target_modules': ['lm_head', 'q_proj']},
  ),
  'vera': ('gemma3', 'VeraConfig', {'r': 7, 'target_modules': _VERA}),
  'vera_qwen': ('qwen2', 'VeraConfig', {'r': 2, 'save_projection': False}),
  'all_linear': ('llama3', 'LoraConfig', {'target_modules': 'all-linear'}),
  'head': ('llama3', 'LoraConfig', {'target_modules': ['lm_head', 'q_proj']}),
  'biases': ('qwen2', 'LoraConfig', {'target_modules': _PROJECTIONS + _MLP}),
  'a_layer': (
    'gemma2',
    'LoraConfig',
    {'target_modules': ['o_proj'], 'layers_to_transform': [1]},
  ),
  'ia3': (
    'qwen2',
    'IA3Config',
    {
      'target_modules': ['k_proj', 'v_proj', 'down_proj'],
      'feedforward_modules': ['down_proj'],
    },
  ),
  'prompt': ('gemma3', 'PromptTuningConfig', {'num_virtual_tokens': 4}),
}


@pytest.mark.filterwarnings('ignore:Setting `save_embedding_layers`')
@pytest.mark.parametrize('name', PEFTS)
def test_we_compute_the_same_of_theirs(name, folders, tmp_path):
  family, kind, options = PEFTS[name]
  base = _their_model(folders(family))
  without = _their_logits(base)
  random = torch.Generator().manual_seed(0)
  config = getattr(peft, kind)(task_type='CAUSAL_LM', **options)
  model = peft.get_peft_model(base, config).eval()
  for parameter in model.parameters():
    if parameter.requires_grad:
      parameter.data.normal_(0.1, 0.3, generator=random)
  model.save_pretrained(tmp_path / 'adapter')
  theirs = _their_logits(model)
  seed = seeds.load_seed(tmp_path / 'adapter')
  ours = _our_logits(family, seed.adapter, seed.params)
  _assert_same(ours, theirs, without)
  if kind != 'PromptTuningConfig':
    merged = seed.merged()
    ours = _our_logits(family, merged.adapter, merged.params)
    _assert_same(ours, theirs, without)


def test_an_output_projection_of_another_base_is_refused(folders, tmp_path):
  """PEFT saves it beside its adapter."""
  base = _their_model(folders('llama3'))
  config = peft.LoraConfig(task_type='CAUSAL_LM', target_modules=['lm_head'])
  model = peft.get_peft_model(base, config)
  with torch.no_grad():
    model.get_output_embeddings().base_layer.weight[0, 0] += 1
  with pytest.warns(UserWarning, match='save_embedding_layers'):
    model.save_pretrained(tmp_path / 'adapter')
  with pytest.raises(errors.UserError, match='not that of the base') as error:
    seeds.load_seed(tmp_path / 'adapter')
  assert '\n' not in str(error.value)
