"""Hugging Face's folders of T5 1.1, compared with transformers."""

import dataclasses
import json
import shutil
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy
import tiny_t5

from dst_t5x.checkpoints import hf_checkpoint
from dst_t5x.core import errors
from dst_t5x.models.t5 import network


@pytest.fixture
def saved(tmp_path):
  folder = tmp_path / 'model'
  hf_checkpoint.save(folder, tiny_t5.random_params(), tiny_t5.NETWORK)
  return folder


@pytest.fixture(scope='module')
def transformers():
  return pytest.importorskip('transformers')


@pytest.fixture
def torch_model(transformers):
  """A model made by transformers, with a head of its own, as in T5 1.1."""
  torch = pytest.importorskip('torch')
  config = transformers.T5Config(
    vocab_size=48,
    d_model=8,
    d_kv=6,
    d_ff=20,
    num_layers=3,
    num_decoder_layers=2,
    num_heads=2,
    feed_forward_proj='gated-gelu',
    tie_word_embeddings=False,
  )
  model = transformers.T5ForConditionalGeneration(config)
  model.lm_head.weight = torch.nn.Parameter(torch.randn(48, 8))
  return model


def _change_config(folder, **changes):
  file = folder / 'config.json'
  config = {**json.loads(file.read_text()), **changes}
  file.write_text(json.dumps(config))


def _change_tensors(folder, change):
  file = folder / 'model.safetensors'
  tensors = dict(safetensors_numpy.load_file(file))
  change(tensors)
  file.write_bytes(safetensors_numpy.save(tensors))


def _assert_loads_whole(transformers, folder):
  """Loads a folder in transformers, and compares all tensors with ours."""
  model, info = transformers.T5ForConditionalGeneration.from_pretrained(
    folder, output_loading_info=True
  )
  assert not any(info.values()), info
  theirs = {
    name: tensor.detach().numpy() for name, tensor in model.named_parameters()
  }
  params = tiny_t5.flat(tiny_t5.random_params())
  assert len(theirs) == len(params)
  attention = 'decoder.block.1.layer.1.EncDecAttention'
  ours = 'decoder/layers_1/encoder_decoder_attention'
  for name, expected in {
    'shared.weight': params['token_embedder/embedding'],
    'lm_head.weight': params['decoder/logits_dense/kernel'].T,
    'encoder.final_layer_norm.weight': params['encoder/encoder_norm/scale'],
    f'{attention}.q.weight': params[f'{ours}/query/kernel'].T,
    f'{attention}.o.weight': params[f'{ours}/out/kernel'].T,
    'encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight': (
      params['encoder/relpos_bias/rel_embedding'].T
    ),
    'encoder.block.2.layer.1.DenseReluDense.wi_1.weight': params[
      'encoder/layers_2/mlp/wi_1/kernel'
    ].T,
    'decoder.block.0.layer.2.layer_norm.weight': params[
      'decoder/layers_0/pre_mlp_layer_norm/scale'
    ],
  }.items():
    np.testing.assert_array_equal(theirs[name], expected, err_msg=name)
  return model


def test_round_trip_keeps_every_bit(saved):
  loaded = hf_checkpoint.load(saved)
  assert loaded.step == 0
  tiny_t5.assert_same_bits(loaded.params, tiny_t5.random_params())
  assert not any(
    isinstance(array, np.memmap) or not array.flags.writeable
    for array in tiny_t5.flat(loaded.params).values()
  )


def test_config_of(saved):
  assert hf_checkpoint.model_of(saved).network.config == tiny_t5.CONFIG


def test_transformers_loads_ours(saved, transformers):
  model = _assert_loads_whole(transformers, saved)
  assert model.config.feed_forward_proj == 'gated-gelu'
  assert not model.config.scale_decoder_outputs
  assert model.config.decoder_start_token_id == 0


def test_transformers_loads_our_shards(tmp_path, transformers):
  hf_checkpoint.save(
    tmp_path / 'm',
    tiny_t5.random_params(),
    tiny_t5.NETWORK,
    largest_shard_bytes=3000,
  )
  shards = sorted((tmp_path / 'm').glob('model-*.safetensors'))
  assert len(shards) > 3
  assert all(shard.stat().st_size < 3000 + 2000 for shard in shards)
  _assert_loads_whole(transformers, tmp_path / 'm')
  tiny_t5.assert_same_bits(
    hf_checkpoint.load(tmp_path / 'm').params, tiny_t5.random_params()
  )


@pytest.mark.parametrize('size', ['1GB', '3KB'])
def test_a_folder_of_transformers_loads(torch_model, tmp_path, size):
  torch_model.save_pretrained(tmp_path, max_shard_size=size)
  assert (tmp_path / 'model.safetensors').exists() == (size == '1GB')
  assert hf_checkpoint.model_of(tmp_path).network.config == tiny_t5.CONFIG
  loaded = hf_checkpoint.load(tmp_path)
  assert (
    tiny_t5.flat(loaded.params).keys() == tiny_t5.flat(tiny_t5.shapes()).keys()
  )
  # Back through our writer into transformers: the same model.
  hf_checkpoint.save(tmp_path / 'ours', loaded.params, tiny_t5.NETWORK)
  again = type(torch_model).from_pretrained(tmp_path / 'ours')
  theirs = dict(again.named_parameters())
  for name, tensor in torch_model.named_parameters():
    np.testing.assert_array_equal(
      tensor.detach().numpy(), theirs[name].detach().numpy(), err_msg=name
    )


def test_bfloat16_and_float16_are_read_exactly(torch_model, tmp_path):
  torch = pytest.importorskip('torch')
  for dtype, numpy_dtype in (
    (torch.bfloat16, ml_dtypes.bfloat16),
    (torch.float16, np.float16),
  ):
    folder = tmp_path / str(dtype)
    expected = torch_model.lm_head.weight.detach().numpy().astype(numpy_dtype)
    half = type(torch_model).from_pretrained(
      _saved(torch_model, tmp_path / f'{dtype}-full'), dtype=dtype
    )
    read = hf_checkpoint.load(_saved(half, folder)).params
    kernel = read['decoder']['logits_dense']['kernel']
    assert kernel.dtype == np.float32
    np.testing.assert_array_equal(kernel.T, expected.astype(np.float32))


def _saved(model, folder):
  model.save_pretrained(folder)
  return folder


def test_head_that_transformers_left_out_is_the_embedding(
  transformers, torch_model, tmp_path
):
  """Transformers 5 states tied embeddings for every T5, unscaled for 1.1."""
  torch_model.lm_head.weight = torch_model.shared.weight
  torch_model.save_pretrained(tmp_path)
  names = safetensors_numpy.load_file(tmp_path / 'model.safetensors').keys()
  if 'lm_head.weight' in names:
    pytest.skip('this transformers stores the head')
  params = hf_checkpoint.load(tmp_path).params
  np.testing.assert_array_equal(
    params['decoder']['logits_dense']['kernel'].T,
    params['token_embedder']['embedding'],
  )


def test_equal_copies_of_the_embedding_are_allowed(saved):
  def add(tensors):
    tensors['encoder.embed_tokens.weight'] = tensors['shared.weight']
    tensors['decoder.embed_tokens.weight'] = tensors['shared.weight']

  _change_tensors(saved, add)
  tiny_t5.assert_same_bits(
    hf_checkpoint.load(saved).params, tiny_t5.random_params()
  )


def test_other_copies_of_the_embedding_are_refused(saved):
  def add(tensors):
    tensors['encoder.embed_tokens.weight'] = tensors['shared.weight'] + 1

  _change_tensors(saved, add)
  with pytest.raises(errors.UserError, match=r'encoder.embed_tokens.weight d'):
    hf_checkpoint.load(saved)


def test_missing_tensor_is_named(saved):
  _change_tensors(saved, lambda tensors: tensors.pop('lm_head.weight'))
  with pytest.raises(errors.UserError, match=r'lacks tensor lm_head.weight'):
    hf_checkpoint.load(saved)


def test_superfluous_tensor_is_named(saved):
  extra = 'decoder.block.2.layer.0.layer_norm.weight'
  _change_tensors(
    saved, lambda tensors: tensors.update({extra: np.ones(8, np.float32)})
  )
  with pytest.raises(errors.UserError, match=extra):
    hf_checkpoint.load(saved)


def test_misshapen_tensor_is_named(saved):
  def cut(tensors):
    tensors['encoder.final_layer_norm.weight'] = np.ones(7, np.float32)

  _change_tensors(saved, cut)
  with pytest.raises(errors.UserError, match=r'encoder.final_layer_norm.*\(7,'):
    hf_checkpoint.load(saved)


def test_wrong_vocabulary_is_named(saved):
  _change_config(saved, vocab_size=64)
  with pytest.raises(errors.UserError, match=r'shared.weight .*\(64, 8\)'):
    hf_checkpoint.load(saved)


def test_float64_is_named(saved):
  def widen(tensors):
    tensors['lm_head.weight'] = tensors['lm_head.weight'].astype(np.float64)

  _change_tensors(saved, widen)
  with pytest.raises(errors.UserError, match=r'lm_head.weight .* F64, not F32'):
    hf_checkpoint.load(saved)


@pytest.mark.parametrize('kept', [-1, 3, 100, 0])
def test_truncated_file_is_named(saved, kept):
  file = saved / 'model.safetensors'
  file.write_bytes(file.read_bytes()[:kept])
  with pytest.raises(errors.UserError, match=r'model.safetensors is truncated'):
    hf_checkpoint.load(saved)


@pytest.mark.parametrize('stale', ['there', 'gone'])
def test_one_file_goes_before_an_index(torch_model, tmp_path, stale):
  """The index is left over from an older save in the same folder."""
  torch_model.save_pretrained(tmp_path / 'old', max_shard_size='3KB')
  torch_model.shared.weight.data += 1
  torch_model.save_pretrained(tmp_path / 'new')
  for file in (tmp_path / 'old').glob('model*'):
    if stale == 'there' or file.suffix == '.json':
      shutil.copy(file, tmp_path / 'new')
  loaded = hf_checkpoint.load(tmp_path / 'new').params
  theirs = type(torch_model).from_pretrained(tmp_path / 'new')
  np.testing.assert_array_equal(
    loaded['token_embedder']['embedding'], theirs.shared.weight.detach()
  )
  np.testing.assert_array_equal(
    loaded['token_embedder']['embedding'], torch_model.shared.weight.detach()
  )


@pytest.mark.parametrize('with_head', [True, False])
def test_what_save_model_writes_is_read(torch_model, tmp_path, with_head):
  """It keeps one name of a shared tensor, which is not `shared.weight`."""
  safetensors_torch = pytest.importorskip('safetensors.torch')
  if not with_head:
    torch_model.lm_head.weight = torch_model.shared.weight
  torch_model.config.save_pretrained(tmp_path)
  file = tmp_path / 'model.safetensors'
  safetensors_torch.save_model(torch_model, str(file))
  names = safetensors_numpy.load_file(file).keys()
  assert 'shared.weight' not in names
  assert ('lm_head.weight' in names) == with_head
  params = hf_checkpoint.load(tmp_path).params
  for array, tensor in (
    (params['token_embedder']['embedding'], torch_model.shared.weight),
    (params['decoder']['logits_dense']['kernel'].T, torch_model.lm_head.weight),
  ):
    np.testing.assert_array_equal(array, tensor.detach())


@pytest.mark.parametrize('prefix', ['module.', '_orig_mod.', 'model.base.'])
def test_a_prefix_of_all_names_is_named(saved, prefix):
  def wrap(tensors):
    for name in list(tensors):
      tensors[f'{prefix}{name}'] = tensors.pop(name)

  _change_tensors(saved, wrap)
  with pytest.raises(errors.UserError, match=f"begin with '{prefix}'") as e:
    hf_checkpoint.load(saved)
  assert '\n' not in str(e.value)


@pytest.fixture
def sharded(tmp_path):
  folder = tmp_path / 'sharded'
  hf_checkpoint.save(folder, tiny_t5.random_params(), tiny_t5.NETWORK, 3000)
  return folder


@pytest.mark.parametrize(
  'index',
  [
    *([], None, 3, {}, {'weight_map': None}, {'weight_map': []}),
    {'weight_map': {'shared.weight': None}},
    {'weight_map': {'shared.weight': 3, 'lm_head.weight': 'a.safetensors'}},
    {'weight_map': {'shared.weight': ['a']}},
    {'weight_map': {'shared.weight': '../sharded/model.safetensors'}},
    {'weight_map': {'shared.weight': '/etc/model.safetensors'}},
    {'weight_map': {'shared.weight': 's3://bucket/model.safetensors'}},
    {'weight_map': {'shared.weight': 'config.json'}},
    {'weight_map': {'shared.weight': ''}},
    {'weight_map': {'shared.weight': 'a\n.safetensors'}},
  ],
)
def test_what_is_no_index_is_named(sharded, index):
  (sharded / 'model.safetensors.index.json').write_text(json.dumps(index))
  with pytest.raises(errors.UserError, match=r'index\.json') as caught:
    hf_checkpoint.load(sharded)
  assert '\n' not in str(caught.value)


def test_a_tensor_in_two_files_is_refused(sharded):
  first, *_, last = sorted(sharded.glob('model-*.safetensors'))
  tensors = dict(safetensors_numpy.load_file(last))
  tensors |= safetensors_numpy.load_file(first)
  last.write_bytes(safetensors_numpy.save(tensors))
  with pytest.raises(errors.UserError, match=f'two files, {last.name} is one'):
    hf_checkpoint.load(sharded)


@pytest.mark.parametrize('largest', [10**9, 10**5])
def test_no_more_than_a_tensor_is_in_memory_twice(tmp_path, largest):
  config = dataclasses.replace(tiny_t5.CONFIG, vocab_size=4000, emb_dim=32)
  params = tiny_t5.random_params(config)
  arrays = tiny_t5.flat(params).values()
  sizes = sorted(array.nbytes for array in arrays)
  hf_checkpoint.save(
    tmp_path / 'm', params, network.Transformer(config), largest
  )
  hf_checkpoint.load(tmp_path / 'm')  # What is imported stays.
  tracemalloc.start()
  loaded = hf_checkpoint.load(tmp_path / 'm')
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert peak < sum(sizes) + 1.5 * sizes[-1]
  tiny_t5.assert_same_bits(loaded.params, params)


def test_missing_shard_is_named(tmp_path):
  folder = tmp_path / 'm'
  hf_checkpoint.save(folder, tiny_t5.random_params(), tiny_t5.NETWORK, 3000)
  next(folder.glob('model-00002-*')).unlink()
  with pytest.raises(errors.UserError, match=r'00002-of.* is missing$'):
    hf_checkpoint.load(folder)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'tie_word_embeddings': True}, 'ties the output'),
    ({'scale_decoder_outputs': True}, 'ties the output'),
    ({'feed_forward_proj': 'relu'}, "feed_forward_proj 'relu'"),
    ({'model_type': 'bert'}, "model_type 'bert'"),
    ({'relative_attention_max_distance': 64}, 'max_distance 64'),
  ],
)
def test_another_kind_of_model_is_refused(saved, changes, message):
  _change_config(saved, **changes)
  for read in (hf_checkpoint.load, hf_checkpoint.model_of):
    with pytest.raises(errors.UserError, match=message):
      read(saved)


def test_config_lacks_a_size(saved):
  config = json.loads((saved / 'config.json').read_text())
  del config['d_kv']
  (saved / 'config.json').write_text(json.dumps(config))
  with pytest.raises(errors.UserError, match="lacks 'd_kv'"):
    hf_checkpoint.load(saved)


def test_damaged_config_is_named(saved):
  (saved / 'config.json').write_text('{')
  with pytest.raises(errors.UserError, match=r'config.json'):
    hf_checkpoint.load(saved)


def test_pickle_is_not_read(saved):
  (saved / 'model.safetensors').rename(saved / 'pytorch_model.bin')
  with pytest.raises(errors.UserError, match='save_pretrained'):
    hf_checkpoint.load(saved)


def test_save_refuses_what_is_no_t5_1_1(tmp_path):
  params = tiny_t5.random_params()
  tied = dataclasses.replace(tiny_t5.CONFIG, logits_via_embedding=True)
  with pytest.raises(errors.UserError, match='logits_via_embedding'):
    hf_checkpoint.save(tmp_path / 'm', params, network.Transformer(tied))
  wide = dataclasses.replace(tiny_t5.CONFIG, mlp_dim=24)
  with pytest.raises(errors.UserError, match='mlp/wi_0/kernel'):
    hf_checkpoint.save(tmp_path / 'm', params, network.Transformer(wide))
  params['decoder']['adapter'] = np.ones(3, np.float32)
  with pytest.raises(errors.UserError, match='decoder/adapter is superfluous'):
    hf_checkpoint.save(tmp_path / 'm', params, tiny_t5.NETWORK)
  assert not (tmp_path / 'm').exists()


def test_save_never_overwrites(saved):
  with pytest.raises(errors.UserError, match='exists already'):
    hf_checkpoint.save(saved, tiny_t5.random_params(), tiny_t5.NETWORK)
