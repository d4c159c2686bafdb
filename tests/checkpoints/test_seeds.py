"""Loading seeds: the format of a path, and whether it is the right model."""

import dataclasses

import numpy as np
import pytest
import refusals
import tiny_t5

from dst_t5x import subsets
from dst_t5x.adapters import lora
from dst_t5x.checkpoints import hf_checkpoint
from dst_t5x.checkpoints import matching
from dst_t5x.checkpoints import places
from dst_t5x.checkpoints import seeds
from dst_t5x.checkpoints import t5x_checkpoint
from dst_t5x.core import errors
from dst_t5x.subsets import fingerprint


def test_t5x_checkpoint(tmp_path, caplog):
  params = tiny_t5.random_params()
  for step in (2, 12):
    t5x_checkpoint.save(tmp_path, params, step)
  with caplog.at_level('INFO'):
    seed = seeds.load_seed(tmp_path)
  tiny_t5.assert_same_bits(seed.params, params)
  assert (seed.format, seed.step) == ('t5x', 12)
  # The very checkpoint, so that a later one in the folder changes nothing.
  assert seed.path == str(tmp_path / 'checkpoint_12')
  assert seed.fingerprint == fingerprint.fingerprint(params)
  flat = tiny_t5.flat(params)
  size = sum(array.size for array in flat.values())
  assert (
    f'Loaded {seed.path} (format t5x, step 12): {len(flat)} tensors,'
    f' {size} parameters, fingerprint {seed.fingerprint}'
  ) in caplog.text


def test_hugging_face_folder(tmp_path):
  params = tiny_t5.random_params()
  hf_checkpoint.save(tmp_path / 'm', params, tiny_t5.NETWORK)
  seed = seeds.load_seed(str(tmp_path / 'm'))
  assert (seed.format, seed.step) == ('hf', 0)
  assert seed.fingerprint == fingerprint.fingerprint(params)


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize('save', ['t5x', 'hf'])
def test_what_is_not_finite_is_named(tmp_path, save, value):
  params = tiny_t5.random_params()
  params['encoder']['layers_1']['mlp']['wo']['kernel'][3, 2:4] = value
  params['decoder']['decoder_norm']['scale'][0] = value
  if save == 'hf':
    hf_checkpoint.save(tmp_path / 'm', params, tiny_t5.NETWORK)
  else:
    t5x_checkpoint.save(tmp_path / 'm', params, step=1)
  said = refusals.refusal(seeds.load_seed, tmp_path / 'm')
  assert (
    '1 of 8 values of tensor decoder/decoder_norm/scale are NaN or infinite'
    ' (2 such tensors)'
  ) in said


def test_the_largest_numbers_are_finite(tmp_path):
  params = tiny_t5.random_params()
  scale = params['decoder']['decoder_norm']['scale']
  scale[:2] = np.finfo(np.float32).max, np.finfo(np.float32).min
  hf_checkpoint.save(tmp_path / 'm', params, tiny_t5.NETWORK)
  tiny_t5.assert_same_bits(seeds.load_seed(tmp_path / 'm').params, params)


def test_what_overflows_when_merged_is_named():
  params = tiny_t5.random_params()
  query = params['encoder']['layers_0']['attention']['query']
  query |= {
    'lora_a': np.full((8, 1), 1e20, np.float32),
    'lora_b': np.full((1, 12), 1e20, np.float32),
  }
  adapter = lora.LoRA(rank=1)
  seed = seeds.Seed(params, 'here', 'peft', 0, adapter)
  with np.errstate(over='ignore'):
    said = refusals.refusal(seed.merged)
  assert 'tensor encoder/layers_0/attention/query/kernel are NaN or inf' in said


def _subset_file(folder, **changes):
  """Returns a subset file with a changed record of its seed, and the seed."""
  hf_checkpoint.save(folder / 'm', tiny_t5.random_params(), tiny_t5.NETWORK)
  seed = seeds.load_seed(folder / 'm')
  found = subsets.extract(seed.params, seed.params, seed.fingerprint)
  about = {'seed': {**seed.reference, **changes}, 'step': 3}
  subsets.save(folder / 'a.dst', found, about)
  return folder / 'a.dst'


@pytest.mark.parametrize('key', ['path', 'format', 'step', 'name'])
@pytest.mark.parametrize('value', [3, [], {}, True, 'x', None, '\ud800'])
def test_whatever_a_subset_says_of_its_seed(tmp_path, key, value):
  file = _subset_file(tmp_path, **{key: value})
  said = refusals.refusal(seeds.load_seed, file)
  if said is not None:
    assert str(file) in said
  is_read = key in ('name', 'step') or (
    key == 'format' and value in ('x', None)
  )
  assert (said is None) == is_read


@pytest.mark.parametrize('step', ['3', [], None, 2.5, True])
def test_whatever_a_subset_says_of_its_step(tmp_path, step):
  file = _subset_file(tmp_path)
  found, about = subsets.load(file)
  subsets.save(file, found, {**about, 'step': step})
  said = refusals.refusal(seeds.load_seed, file)
  assert (said is None) == (step is None)


def test_real_checkpoint(shared_data):
  seed = seeds.load_seed(shared_data / 'checkpoints/t5_1_1_tiny_legacy')
  assert (seed.format, seed.step) == ('t5x', 3)


def test_misspelt_path_names_the_nearest(tmp_path):
  (tmp_path / 't5_1_1_small').mkdir()
  for path in ('t5_1_small', 't5_1_small/checkpoint_1000000'):
    with pytest.raises(errors.UserError, match="did you mean 't5_1_1_small'"):
      seeds.load_seed(tmp_path / path)


def test_missing_step_names_the_nearest(tmp_path):
  t5x_checkpoint.save(tmp_path, tiny_t5.random_params(), step=1000)
  with pytest.raises(errors.UserError, match="did you mean 'checkpoint_1000'"):
    seeds.load_seed(tmp_path / 'checkpoint_10000')


def test_unknown_format_says_what_was_looked_for(tmp_path):
  (tmp_path / 'notes.txt').write_text('')
  with pytest.raises(errors.UserError, match='checkpoint_<step>') as caught:
    seeds.load_seed(tmp_path)
  for name in ('config.json', 'model.safetensors', 'run.json'):
    assert name in str(caught.value)
  assert '\n' not in str(caught.value)


def test_file_is_no_folder(tmp_path):
  folder = t5x_checkpoint.save(tmp_path, tiny_t5.random_params(), step=1)
  with pytest.raises(errors.UserError, match='is a file'):
    seeds.load_seed(folder / 'checkpoint')


def test_check_matches_accepts_the_model():
  matching.check_matches(tiny_t5.random_params(), tiny_t5.shapes())


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'vocab_size': 64}, 'another vocabulary: vocab_size is 48 .* 64 in'),
    ({'emb_dim': 16}, 'another size: emb_dim is 8 .* 16 in'),
    ({'num_encoder_layers': 4}, 'num_encoder_layers is 3 .* 4 in'),
    ({'num_decoder_layers': 1}, 'num_decoder_layers is 2 .* 1 in'),
    ({'mlp_dim': 24}, 'mlp_dim is 20 .* 24 in'),
    ({'num_heads': 3, 'head_dim': 4}, 'num_heads is 2 .* 3 in'),
    ({'head_dim': 4}, 'head_dim is 6 .* 4 in'),
  ],
)
def test_check_matches_tells_another_size(changes, message):
  expected = tiny_t5.shapes(dataclasses.replace(tiny_t5.CONFIG, **changes))
  with pytest.raises(errors.UserError, match=message) as caught:
    matching.check_matches(tiny_t5.random_params(), expected)
  assert '\n' not in str(caught.value)


def test_check_matches_names_a_missing_tensor():
  params = tiny_t5.random_params()
  del params['decoder']['layers_1']['self_attention']['key']
  with pytest.raises(
    errors.UserError, match='lacks tensor decoder/layers_1/self_attention/key'
  ):
    matching.check_matches(params, tiny_t5.shapes())


def test_check_matches_names_a_superfluous_tensor():
  params = tiny_t5.random_params()
  params['encoder']['layers_0']['attention']['query']['bias'] = np.ones(12)
  with pytest.raises(
    errors.UserError, match='tensor encoder/layers_0/attention/query/bias'
  ):
    matching.check_matches(params, tiny_t5.shapes())


def test_check_matches_names_a_misshapen_tensor():
  params = tiny_t5.random_params()
  params['decoder']['relpos_bias']['rel_embedding'] = np.ones((2, 4))
  with pytest.raises(
    errors.UserError, match=r'decoder/relpos_bias/rel_embedding is \(2, 4\)'
  ):
    matching.check_matches(params, tiny_t5.shapes())


def test_a_bucket_out_of_reach_is_one_line(monkeypatch):
  def unreachable(path):
    raise RuntimeError('no route\nto the host')

  monkeypatch.setattr(places, 'existing_folder', unreachable)
  with pytest.raises(errors.UserError, match=r'cannot reach gs://x: no route$'):
    seeds.load_seed('gs://x')
