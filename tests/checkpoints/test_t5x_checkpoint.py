"""The format of the public T5X checkpoints."""

import copy
import gzip
import json
import re
import shutil

from etils import epath
from flax import serialization
from flax import traverse_util
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import jax
import ml_dtypes
import msgpack
import numpy as np
import orbax.checkpoint as ocp
import pytest
import refusals
import tensorstore
import tiny_t5

from dst_t5x.checkpoints import t5x_checkpoint
from dst_t5x.core import errors
from dst_t5x.core import stacking

_QUERY = 'encoder/layers_0/attention/query/kernel'
_QUERY_FOLDER = 'target.encoder.layers_0.attention.query.kernel'


@pytest.fixture
def saved(tmp_path):
  return t5x_checkpoint.save(tmp_path, tiny_t5.random_params(), step=12)


def _rewrite_index(folder, change):
  """Changes the decoded msgpack index of a checkpoint."""
  index = folder / 'checkpoint'
  content = serialization.msgpack_restore(index.read_bytes())
  change(content)
  index.write_bytes(serialization.msgpack_serialize(content))


def _store(path, array, **metadata):
  """Writes a zarr folder by TensorStore, as T5X does."""
  spec = {
    'driver': 'zarr',
    'dtype': array.dtype.name,
    'kvstore': {'driver': 'file', 'path': f'{path}/'},
    'metadata': {
      'shape': array.shape,
      'compressor': {'id': 'gzip'},
      **metadata,
    },
  }
  shutil.rmtree(path, ignore_errors=True)
  tensorstore.open(spec, create=True).result().write(array).result()


def test_real_checkpoint_loads(shared_data):
  folder = shared_data / 'checkpoints/t5_1_1_tiny_legacy/checkpoint_3'
  loaded = t5x_checkpoint.load(folder)
  flat = tiny_t5.flat(loaded.params)
  assert loaded.step == 3
  assert len(flat) == 52
  assert {array.dtype for array in flat.values()} == {np.dtype('float32')}
  assert flat['token_embedder/embedding'].shape == (32128, 4)
  assert flat['decoder/logits_dense/kernel'].shape == (4, 32128)
  # A chunk decoded by hand, without TensorStore.
  chunk = gzip.decompress(
    (folder / 'target.token_embedder.embedding' / '1.0').read_bytes()
  )
  np.testing.assert_array_equal(
    np.frombuffer(chunk, '<f4').reshape(4096, 4),
    flat['token_embedder/embedding'][4096:8192],
  )


def test_real_checkpoint_survives_a_round_trip(shared_data, tmp_path):
  loaded = t5x_checkpoint.load(shared_data / 'checkpoints/t5_1_1_tiny_legacy')
  t5x_checkpoint.save(tmp_path, loaded.params, loaded.step)
  again = t5x_checkpoint.load(tmp_path)
  assert again.step == 3
  tiny_t5.assert_same_bits(loaded.params, again.params)


def test_round_trip_keeps_every_bit(tmp_path):
  params = tiny_t5.random_params()
  table = params['token_embedder']['embedding']
  table[0, :4] = -0.0, np.nan, np.inf, 1e-42
  folder = t5x_checkpoint.save(tmp_path / 'checkpoint_5', params, step=5)
  assert folder.name == 'checkpoint_5'
  loaded = t5x_checkpoint.load(folder)
  assert loaded.step == 5
  tiny_t5.assert_same_bits(loaded.params, params)


def test_large_tensors_are_chunked(tmp_path, monkeypatch):
  monkeypatch.setattr(t5x_checkpoint, '_CHUNK_BYTES', 100)
  params = tiny_t5.random_params()
  folder = t5x_checkpoint.save(tmp_path, params, step=1)
  chunks = list((folder / _QUERY_FOLDER).glob('*.0'))
  assert len(chunks) == 4  # 8 rows of 48 bytes, 2 a chunk
  tiny_t5.assert_same_bits(t5x_checkpoint.load(folder).params, params)


def test_parent_means_the_newest_step(tmp_path, caplog):
  for step in (9, 100, 20):
    t5x_checkpoint.save(tmp_path, tiny_t5.random_params(), step)
  (tmp_path / 'checkpoint_300.tmp-1').mkdir()
  assert t5x_checkpoint.steps(tmp_path) == [9, 20, 100]
  with caplog.at_level('INFO'):
    assert t5x_checkpoint.load(tmp_path).step == 100
  assert 'checkpoint_100' in caplog.text


@pytest.mark.parametrize('kind', ['empty', 'arrays', 'tmp', 'file'])
def test_what_is_not_whole_is_left_out(tmp_path, kind, caplog):
  """A killed T5X leaves folders without an index, which it writes last."""
  for step in (300, 400):
    t5x_checkpoint.save(tmp_path, tiny_t5.random_params(), step)
  newest = tmp_path / 'checkpoint_500'
  if kind == 'arrays':
    shutil.copytree(tmp_path / 'checkpoint_400', newest)
    (newest / 'checkpoint').unlink()
  elif kind == 'file':
    newest.write_text('')
  else:
    newest.mkdir()
  if kind == 'tmp':
    (newest / 'checkpoint.tmp-1').write_text('')
  assert t5x_checkpoint.load(tmp_path).step == 400
  assert f'{newest} has no file' in caplog.text
  shutil.rmtree(tmp_path / 'checkpoint_400')
  shutil.rmtree(tmp_path / 'checkpoint_300')
  said = refusals.refusal(t5x_checkpoint.load, tmp_path)
  assert 'no file' in said


def test_what_orbax_left_is_left_out(tmp_path, orbax_saved):
  newest = orbax_saved.with_name('checkpoint_5')
  (newest / 'state').mkdir(parents=True)
  assert t5x_checkpoint.load(orbax_saved.parent).step == 4


STEPS = {
  **{repr(step): step for step in ('3', [1, 2], {'a': 1}, 2.5, -1, True, b'x')},
  'array': np.arange(3),
  'float': np.float32(3),
}


@pytest.mark.parametrize('step', STEPS)
def test_what_is_no_step_is_said(saved, step):
  _rewrite_index(
    saved, lambda c: c['optimizer']['state'].update(step=STEPS[step])
  )
  said = refusals.refusal(t5x_checkpoint.load, saved)
  assert f'{saved} is damaged: its step is ' in said


@pytest.mark.parametrize('state', [None, 3, 'x', [], {}, {'step': None}])
def test_without_a_step_the_folder_tells(saved, state):
  _rewrite_index(saved, lambda c: c['optimizer'].update(state=state))
  assert t5x_checkpoint.load(saved).step == 12


VALUES = st.one_of(
  st.none(),
  st.booleans(),
  st.integers(-3, 2**63),
  st.text(max_size=3),
  st.sampled_from(['zarr', 'driver', '..', '/', 'x' * 999]),
  st.binary(max_size=3),
  st.just([]),
  st.just({}),
  st.dictionaries(
    st.sampled_from(['driver', 'kvstore', 'path', 'x', 'a/b', '']),
    st.sampled_from(['zarr', 'file', '..', None, 3, {}, {'path': 3}]),
  ),
)


@st.composite
def _forged(draw):
  """Returns a function that changes one entry of an index, by its keys."""
  picks = draw(st.lists(st.integers(0, 9), max_size=7))
  value = draw(VALUES)
  key = draw(st.one_of(st.none(), st.integers(0, 3), st.text(max_size=2)))

  def change(content):
    node = content
    for pick in picks:
      name = sorted(node)[pick % len(node)]
      if not (isinstance(node[name], dict) and node[name]):
        break
      node = node[name]
    node[name if picks and key is None else key] = value

  return change


@settings(max_examples=200, deadline=None)
@given(forge=_forged(), place=st.integers(0, 10**5), bits=st.integers(0, 255))
def test_forged_indices_are_one_line_or_read(
  index_of_arrays, forge, place, bits
):
  folder, content = index_of_arrays
  content = copy.deepcopy(content)
  forge(content)
  blob = bytearray(msgpack.packb(content, default=_packed, strict_types=True))
  if place % 2:
    blob[place % len(blob)] ^= bits
  (folder / 'checkpoint').write_bytes(blob)
  said = refusals.refusal(t5x_checkpoint.load, folder)
  assert said is None or str(folder) in said or said.startswith('tensor ')


def _packed(array):
  return serialization._msgpack_ext_pack(array)


@pytest.fixture(scope='module')
def index_of_arrays(tmp_path_factory):
  """A checkpoint of some tensors in the index and one beside it."""
  folder = tmp_path_factory.mktemp('t5x') / 'checkpoint_1'
  layer = {'kernel': np.ones((2, 2), np.float32), 'scale': np.ones(2)}
  layer['scale'] = layer['scale'].astype(np.float32)
  params = {'encoder': {'layers_0': layer, 'norm': {'scale': layer['scale']}}}
  t5x_checkpoint.save(folder, params, step=1)
  blob = (folder / 'checkpoint').read_bytes()
  return folder, serialization.msgpack_restore(blob)


def test_absurd_sizes_are_refused_before_they_are_read(saved):
  file = saved / _QUERY_FOLDER / '.zarray'
  stated = json.loads(file.read_text())
  stated |= {'shape': [2**40, 2**10], 'fill_value': 0.0}
  file.write_text(json.dumps(stated))
  said = refusals.refusal(t5x_checkpoint.load, saved)
  assert re.search('claims .* GiB .* this machine has', said)


def test_moved_checkpoint_of_a_bucket_loads(saved, tmp_path):
  def move(content):
    for spec in traverse_util.flatten_dict(
      content['optimizer']['target'], is_leaf=lambda _, x: 'driver' in x
    ).values():
      if isinstance(spec, dict):
        spec['kvstore'] = {
          'driver': 'gcs',
          'bucket': 't5x-dummy-bucket',
          'path': f'old/place/checkpoint_12/{spec["kvstore"]["path"]}/',
        }

  _rewrite_index(saved, move)
  moved = tmp_path / 'elsewhere'
  saved.rename(moved)
  tiny_t5.assert_same_bits(
    t5x_checkpoint.load(moved).params, tiny_t5.random_params()
  )


def test_bfloat16_is_read_exactly(saved):
  array = np.linspace(-3, 3, 96).reshape(8, 12).astype(ml_dtypes.bfloat16)
  _store(saved / _QUERY_FOLDER, array, chunks=[4, 5])
  read = tiny_t5.flat(t5x_checkpoint.load(saved).params)[_QUERY]
  assert read.dtype == np.float32
  np.testing.assert_array_equal(read, array.astype(np.float32))


@pytest.mark.parametrize('dtype', [np.float32, ml_dtypes.bfloat16])
def test_tensors_inside_the_index(saved, monkeypatch, dtype):
  array = np.arange(96).reshape(8, 12).astype(dtype)

  def put(content):
    layer = content['optimizer']['target']['encoder']['layers_0']
    layer['attention']['query']['kernel'] = array

  # Flax splits what is larger than this into chunks.
  monkeypatch.setattr(serialization, 'MAX_CHUNK_SIZE', 64)
  _rewrite_index(saved, put)
  assert b'__msgpack_chunked_array__' in (saved / 'checkpoint').read_bytes()
  read = tiny_t5.flat(t5x_checkpoint.load(saved).params)[_QUERY]
  np.testing.assert_array_equal(read, array.astype(np.float32))


def test_optimizer_moments_are_never_read(saved):
  def add(content):
    content['optimizer']['state']['param_states'] = {
      'v': {'driver': 'zarr', 'kvstore': {'driver': 'file', 'path': 'gone'}}
    }

  _rewrite_index(saved, add)
  tiny_t5.assert_same_bits(
    t5x_checkpoint.load(saved).params, tiny_t5.random_params()
  )


def test_zeros_left_out_on_purpose_are_zeros(saved):
  array = np.zeros((8, 12), np.float32)
  metadata = {'chunks': [4, 12], 'dtype': '<f4', 'fill_value': 0.0}
  _store(saved / _QUERY_FOLDER, array, **metadata)
  assert [p.name for p in (saved / _QUERY_FOLDER).iterdir()] == ['.zarray']
  read = tiny_t5.flat(t5x_checkpoint.load(saved).params)[_QUERY]
  np.testing.assert_array_equal(read, array)


def test_truncated_index_is_named(saved):
  index = saved / 'checkpoint'
  index.write_bytes(index.read_bytes()[:-20])
  with pytest.raises(errors.UserError, match=r'checkpoint_12/checkpoint is tr'):
    t5x_checkpoint.load(saved)


def test_index_of_a_tensorflow_checkpoint_is_refused(saved):
  (saved / 'checkpoint').write_text('model_checkpoint_path: "model.ckpt-1"\n')
  with pytest.raises(errors.UserError, match='no T5X checkpoint'):
    t5x_checkpoint.load(saved)


def test_index_without_parameters_is_refused(saved):
  _rewrite_index(saved, lambda content: content['optimizer'].pop('target'))
  with pytest.raises(errors.UserError, match='no optimizer/target'):
    t5x_checkpoint.load(saved)


def test_missing_tensor_folder_is_named(saved):
  shutil.rmtree(saved / _QUERY_FOLDER)
  with pytest.raises(errors.UserError, match=_QUERY_FOLDER) as caught:
    t5x_checkpoint.load(saved)
  assert '\n' not in str(caught.value)


def test_missing_chunk_is_not_read_as_zeros(saved):
  (saved / _QUERY_FOLDER / '0.0').unlink()
  with pytest.raises(errors.UserError, match=f'{_QUERY_FOLDER} lacks .* 0.0'):
    t5x_checkpoint.load(saved)


def test_truncated_chunk_is_named(saved):
  chunk = saved / _QUERY_FOLDER / '0.0'
  chunk.write_bytes(chunk.read_bytes()[:-9])
  with pytest.raises(errors.UserError, match=f'{_QUERY_FOLDER} is missing or'):
    t5x_checkpoint.load(saved)


def test_integers_are_refused(saved):
  _store(saved / _QUERY_FOLDER, np.ones((8, 12), np.int32), chunks=[8, 12])
  with pytest.raises(errors.UserError, match=f'{_QUERY} .*int32'):
    t5x_checkpoint.load(saved)


@pytest.fixture
def orbax_saved(tmp_path):
  """A checkpoint as T5X writes it through Orbax, with moments."""
  params = tiny_t5.random_params()
  folder = tmp_path / 'orbax' / 'checkpoint_4'
  with ocp.PyTreeCheckpointer() as checkpointer:
    moments = jax.tree.map(lambda x: {'v': np.ones_like(x)}, params)
    state = {'step': np.int32(4), 'param_states': moments}
    checkpointer.save(folder / 'state', {'target': params, 'state': state})
  return folder


def test_orbax_format_loads(orbax_saved):
  assert t5x_checkpoint.is_checkpoint(orbax_saved)
  for path in (orbax_saved, orbax_saved.parent):
    loaded = t5x_checkpoint.load(path)
    assert loaded.step == 4
    tiny_t5.assert_same_bits(loaded.params, tiny_t5.random_params())


def test_damaged_orbax_format_is_named(orbax_saved):
  file = orbax_saved / 'state' / '_METADATA'
  file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
  with pytest.raises(errors.UserError, match='state is damaged'):
    t5x_checkpoint.load(orbax_saved)


def test_orbax_format_without_parameters_is_refused(tmp_path):
  folder = tmp_path / 'checkpoint_4'
  with ocp.PyTreeCheckpointer() as checkpointer:
    checkpointer.save(folder / 'state', {'state': {'step': np.int32(4)}})
  with pytest.raises(errors.UserError, match="state holds no 'target'"):
    t5x_checkpoint.load(folder)


def test_stacked_layers_are_unstacked(tmp_path):
  params = tiny_t5.random_params()
  folder = t5x_checkpoint.save(tmp_path, stacking.stack_layers(params), 3)
  tiny_t5.assert_same_bits(t5x_checkpoint.load(folder).params, params)


def test_save_never_overwrites(saved):
  with pytest.raises(errors.UserError, match='exists already'):
    t5x_checkpoint.save(saved, tiny_t5.random_params(), step=12)


def test_save_refuses_a_folder_of_another_step(tmp_path):
  with pytest.raises(errors.UserError, match='checkpoint_12'):
    t5x_checkpoint.save(tmp_path / 'checkpoint_1', {}, step=12)


def test_failed_save_leaves_nothing(tmp_path, monkeypatch):
  def full(*_):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(serialization, 'msgpack_serialize', full)
  with pytest.raises(errors.UserError, match='No space left'):
    t5x_checkpoint.save(tmp_path, tiny_t5.random_params(), step=1)
  assert list(tmp_path.iterdir()) == []


def test_bucket_paths_become_bucket_specs():
  folder = epath.Path('gs://t5-data/models/checkpoint_1') / _QUERY_FOLDER
  assert t5x_checkpoint._key_value_store(folder) == {
    'driver': 'gcs',
    'bucket': 't5-data',
    'path': f'models/checkpoint_1/{_QUERY_FOLDER}/',
  }
