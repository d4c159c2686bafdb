"""The format of the public T5X checkpoints."""

import gzip
import shutil

from etils import epath
from flax import serialization
from flax import traverse_util
import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore
import tiny_t5

from dst_t5x import errors
from dst_t5x import stacking
from dst_t5x import t5x_checkpoint

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
