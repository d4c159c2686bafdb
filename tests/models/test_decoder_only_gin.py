"""The gin files of public decoder-only models."""

import math
import re

import gin
import pytest

from dst_t5x.core import parts
from dst_t5x.models import api
from dst_t5x.models.decoder_only import hf_config
from dst_t5x.models.decoder_only import hf_names

# As the models' own pages count them.
SIZES = {
  'gemma_2b': 2_506_172_416,
  'gemma2_2b': 2_614_341_888,
  'gemma2_9b': 9_241_705_984,
  'gemma2_27b': 27_227_128_320,
  'gemma3_270m': 268_098_176,
  'gemma3_1b': 999_885_952,
  'llama3_2_1b': 1_235_814_400,
  'llama3_1_8b': 8_030_261_248,
  'qwen2_5_0_5b': 494_032_768,
  'qwen2_5_7b': 7_615_616_512,
  'qwen3_0_6b': 596_049_920,
  'smollm2_135m': 134_515_008,
  'smollm2_360m': 361_821_120,
}


def configured(repository, name, *bindings):
  path = repository / 'gin' / 'models' / f'{name}.gin'
  gin.clear_config()
  try:
    gin.add_config_file_search_path(str(repository))
    gin.parse_config_files_and_bindings([str(path)], list(bindings))
    return gin.query_parameter('%ARCHITECTURE').scoped_configurable_fn()
  finally:
    gin.clear_config()


@pytest.mark.parametrize('name', SIZES)
def test_sizes(repository, name):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  model = configured(repository, name)
  flat = parts.flatten(api.shapes(model))
  assert sum(math.prod(leaf.shape) for leaf in flat.values()) == SIZES[name]
  text = (repository / 'gin' / 'models' / f'{name}.gin').read_text()
  assert f'{SIZES[name]:,} parameters' in text
  content = hf_config.config_to_hf(model.config)
  with torch.device('meta'):
    config = transformers.AutoConfig.for_model(**content)
    other = transformers.AutoModelForCausalLM.from_config(config)
  theirs = {name: tuple(x.shape) for name, x in other.named_parameters()}
  layout = hf_names.layout(model.config)
  assert theirs == {name: tensor.shape for name, tensor in layout.items()}
  # Stacked, a layer's number is no part of the path.
  numbers = range(model.config.num_layers)
  assert {tensor.path for tensor in layout.values()} == {
    path.replace('/layers/', f'/layers_{i}/') for path in flat for i in numbers
  }


def test_the_options_of_the_families(repository):
  """The options that do not change the number of parameters."""

  def rope(config):
    rope = config.rope
    return rope.theta, rope.factor, rope.original_length

  gemma, gemma2, gemma3, llama, qwen2, qwen3, smollm2 = (
    configured(repository, name).config
    for name in (
      'gemma_2b',
      'gemma2_9b',
      'gemma3_270m',
      'llama3_1_8b',
      'qwen2_5_7b',
      'qwen3_0_6b',
      'smollm2_360m',
    )
  )
  assert rope(gemma) == rope(gemma2) == (1e4, 1.0, None)
  assert rope(gemma3) == rope(qwen2) == rope(qwen3) == (1e6, 1.0, None)
  assert gemma3.local_rope.theta == 1e4
  assert rope(llama) == (5e5, 8.0, 8192)
  assert rope(smollm2) == (1e5, 1.0, None)
  assert (gemma2.attention_logit_cap, gemma2.logit_cap) == (50, 30)
  # Of the largest only: its width divided by its heads.
  assert configured(repository, 'gemma2_27b').config.query_scalar == 4608 / 32
  assert gemma2.is_local[:3] == (True, False, True)
  assert [i for i, local in enumerate(gemma3.is_local) if not local] == [
    5,
    11,
    17,
  ]
  assert (gemma2.sliding_window, gemma3.sliding_window) == (4096, 512)
  gemmas = (gemma, gemma2, gemma3)
  assert all(c.norm_adds_one and c.scale_embeddings for c in gemmas)
  assert {c.mlp_activation for c in gemmas} == {'gelu'}
  assert {c.begin_id for c in gemmas} == {2}
  others = (llama, qwen2, qwen3, smollm2)
  assert not any(c.norm_adds_one or c.scale_embeddings for c in others)
  assert {c.mlp_activation for c in others} == {'silu'}
  assert [c.begin_id for c in others] == [128000, None, None, None]
  assert [c.norm_epsilon for c in others] == [1e-5, 1e-6, 1e-6, 1e-5]
  assert [c.eos_id for c in others] == [128001, 151643, 151643, 0]


def test_macros_can_be_overridden(repository):
  bindings = ("ACTIVATION_DTYPE = 'bfloat16'", 'DROPOUT_RATE = 0.1')
  config = configured(
    repository, 'smollm2_135m', *bindings, 'EOS_ID = 2'
  ).config
  assert (config.dtype, config.dropout_rate) == ('bfloat16', 0.1)
  assert config.eos_id == 2


def test_every_file_is_of_a_model_or_a_family(repository):
  files = (repository / 'gin' / 'models').glob('*.gin')
  named = {re.sub(r'\.gin$', '', file.name) for file in files}
  shared = {'decoder_only', 'gemma'}
  assert {n for n in named if not n.startswith('t5_')} == SIZES.keys() | shared
