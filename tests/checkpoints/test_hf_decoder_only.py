"""Reading and writing Hugging Face's folders of decoder-only models."""

import json

import decoder_only
from decoder_only import FAMILIES
import ml_dtypes
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from dst_t5x.checkpoints import conversion
from dst_t5x.checkpoints import hf_checkpoint
from dst_t5x.checkpoints import seeds
from dst_t5x.core import errors
from dst_t5x.core import parts

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')


def _assert_same_bits(ours, wanted):
  ours, wanted = parts.flatten(ours), parts.flatten(wanted)
  assert ours.keys() == wanted.keys()
  for path, array in wanted.items():
    assert np.asarray(ours[path]).tobytes() == np.asarray(array).tobytes(), path


@pytest.mark.parametrize('shard_bytes', [10**9, 9_000])
@pytest.mark.parametrize('family', FAMILIES)
def test_what_is_written_is_read_by_transformers_and_here(
  tmp_path, family, shard_bytes
):
  model, params, peer = decoder_only.pair(family)
  folder = tmp_path / 'model'
  hf_checkpoint.save(folder, params, model, shard_bytes)
  is_split = len(list(folder.glob('*.safetensors'))) > 1
  assert is_split == (shard_bytes < 10**9)
  _assert_same_bits(hf_checkpoint.load(folder).params, params)
  theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
  wanted = dict(peer.named_parameters())
  for name, parameter in theirs.named_parameters():
    assert torch.equal(parameter, wanted[name]), name


@pytest.mark.parametrize('family', FAMILIES)
def test_what_transformers_writes_is_read(tmp_path, family):
  model, params, peer = decoder_only.pair(family)
  peer.save_pretrained(tmp_path, max_shard_size='9KB')
  assert len(list(tmp_path.glob('*.safetensors'))) > 1
  seed = seeds.load_seed(tmp_path)
  _assert_same_bits(seed.params, params)
  network = hf_checkpoint.model_of(tmp_path).network
  tokens = {'decoder_input_tokens': np.arange(12).reshape(2, 6)}
  np.testing.assert_array_equal(
    network.logits(seed.params, tokens), model.logits(params, tokens)
  )


def test_bfloat16_keeps_its_values(tmp_path):
  _, params, peer = decoder_only.pair('smollm2')
  peer.save_pretrained(tmp_path / 'whole')
  other = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / 'whole', dtype=torch.bfloat16
  )
  other.save_pretrained(tmp_path / 'half')
  loaded = parts.flatten(hf_checkpoint.load(tmp_path / 'half').params)
  for path, array in parts.flatten(params).items():
    rounded = torch.from_numpy(array).to(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(loaded[path], rounded)
  # And its type, unless a value is not one of bfloat16.
  conversion.convert(tmp_path / 'half', tmp_path / 'again', 'hf')
  ours, theirs = (
    safetensors_numpy.load_file(tmp_path / name / 'model.safetensors')
    for name in ('again', 'half')
  )
  assert ours.keys() == theirs.keys()
  for name, array in theirs.items():
    assert ours[name].dtype == array.dtype == ml_dtypes.bfloat16
    assert ours[name].tobytes() == array.tobytes()
  read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'again')
  assert read.dtype == torch.bfloat16
  seed = seeds.load_seed(tmp_path / 'half')
  seed.params['decoder']['decoder_norm']['scale'][3] = 1 + 2**-20
  conversion.write(tmp_path / 'tuned', seed, 'hf')
  _assert_same_bits(seeds.load_seed(tmp_path / 'tuned').params, seed.params)


def test_a_tied_head_may_be_there_once_more(tmp_path):
  model, params, _ = decoder_only.pair('qwen3')
  hf_checkpoint.save(tmp_path / 'model', params, model)
  file = tmp_path / 'model' / 'model.safetensors'
  tensors = safetensors_numpy.load_file(file)
  tensors['lm_head.weight'] = tensors['model.embed_tokens.weight']
  tensors['model.layers.0.self_attn.rotary_emb.inv_freq'] = np.ones(4, 'f4')
  safetensors_numpy.save_file(tensors, file, {'format': 'pt'})
  _assert_same_bits(hf_checkpoint.load(tmp_path / 'model').params, params)
  tensors['lm_head.weight'] = tensors['lm_head.weight'] + 1
  safetensors_numpy.save_file(tensors, file, {'format': 'pt'})
  with pytest.raises(errors.UserError, match='differs from'):
    hf_checkpoint.load(tmp_path / 'model')


def test_a_missing_bias_is_named(tmp_path):
  model, params, _ = decoder_only.pair('qwen2')
  hf_checkpoint.save(tmp_path / 'model', params, model)
  file = tmp_path / 'model' / 'model.safetensors'
  tensors = safetensors_numpy.load_file(file)
  del tensors['model.layers.1.self_attn.k_proj.bias']
  safetensors_numpy.save_file(tensors, file, {'format': 'pt'})
  with pytest.raises(
    errors.UserError, match=r'layers\.1\.self_attn\.k_proj\.b'
  ):
    hf_checkpoint.load(tmp_path / 'model')


def test_what_the_network_lacks_is_refused_before_tensors_are_read(tmp_path):
  model, params, _ = decoder_only.pair('llama3')
  hf_checkpoint.save(tmp_path / 'model', params, model)
  file = tmp_path / 'model' / 'config.json'
  content = json.loads(file.read_text()) | {'num_local_experts': 8}
  file.write_text(json.dumps(content))
  (tmp_path / 'model' / 'model.safetensors').unlink()
  with pytest.raises(errors.UserError, match='num_local_experts 8') as caught:
    hf_checkpoint.load(tmp_path / 'model')
  assert '\n' not in str(caught.value)
