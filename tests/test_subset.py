"""Subset files: bit for bit there and back, whole or refused."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import reference
import safetensors.numpy

from dst_t5x import errors
from dst_t5x import stacking
from dst_t5x import subset

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]


def _seed(dtype=np.float32):
  r = np.random.default_rng(0)

  def tensor(*shape):
    return r.standard_normal(shape).astype(dtype)

  layer = lambda: {'mlp': {'wi': tensor(4, 6)}, 'norm': tensor(5)}  # noqa: E731
  return {
    'encoder': {f'layers_{i}': layer() for i in range(3)},
    'logits': tensor(2, 3, 4),
    'scale': tensor(),
    'untouched': tensor(7),
  }


def _tuned(seed):
  """Returns a copy with new values, odd bits among them."""
  params = jax.tree.map(np.copy, seed)
  layers = params['encoder']
  unsigned = reference.bits(layers['layers_1']['mlp']['wi'])
  layers['layers_1']['mlp']['wi'][0, 0] = 0.0
  seed['encoder']['layers_1']['mlp']['wi'][0, 0] = -0.0
  unsigned[1, 1] = ~unsigned.dtype.type(0)  # A NaN with all its bits.
  unsigned[3, 5] = 1  # The smallest denormal.
  layers['layers_2']['norm'][4] = np.inf
  params['logits'][1] += 1
  params['scale'][...] = 3
  return params


def assert_same(actual, expected):
  actual, expected = reference.flatten(actual), reference.flatten(expected)
  assert actual.keys() == expected.keys()
  for path, tensor in actual.items():
    tensor, other = np.asarray(tensor), np.asarray(expected[path])
    assert (tensor.shape, tensor.dtype) == (other.shape, other.dtype)
    assert tensor.tobytes() == other.tobytes(), path


def assert_equal(first, second):
  for a, b in (
    (first.positions, second.positions),
    (first.values, second.values),
  ):
    assert a.keys() == b.keys()
    for path in a:
      assert a[path].dtype == b[path].dtype
      assert a[path].tobytes() == b[path].tobytes()


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('stack_seed', [False, True])
@pytest.mark.parametrize('stack_params', [False, True])
def test_there_and_back(dtype, stack_seed, stack_params):
  seed = _seed(dtype)
  params = _tuned(seed)
  before = jax.tree.map(np.copy, seed)
  forms = [lambda tree: tree, stacking.stack_layers]
  tuned = jax.tree.map(jnp.asarray, forms[stack_params](params))
  found = subset.extract(tuned, forms[stack_seed](seed))
  assert found.size == 3 + 1 + 12 + 1
  assert list(found.positions) == [
    'encoder/layers_1/mlp/wi',
    'encoder/layers_2/norm',
    'logits',
    'scale',
  ]
  assert found.positions['encoder/layers_1/mlp/wi'].tolist() == [0, 7, 23]
  assert_same(subset.apply(found, seed), params)
  stacked = subset.apply(found, stacking.stack_layers(seed))
  assert_same(stacked, stacking.stack_layers(params))
  assert_same(seed, before)


@pytest.mark.parametrize('dtype', DTYPES)
def test_files_there_and_back(dtype, tmp_path):
  seed = _seed(dtype)
  found = subset.extract(_tuned(seed), seed)
  assert_equal(subset.from_arrays(subset.to_arrays(found)), found)
  about = {'seed': {'fingerprint': 'a1'}, 'epsilon': 1e-4, 'step': 7}
  file = tmp_path / 'a.safetensors'
  size = subset.save(file, found, about)
  assert size == file.stat().st_size
  loaded, loaded_about = subset.load(str(file))
  assert_equal(loaded, found)
  assert loaded_about == about
  assert_same(subset.apply(loaded, seed), _tuned(seed))
  # Four bytes a position, whatever NumPy makes of them.
  assert size < 17 * (4 + np.dtype(dtype).itemsize) + 800


def test_the_empty_subset(tmp_path):
  seed = _seed()
  nothing = subset.extract(seed, seed)
  assert nothing.size == 0
  subset.save(tmp_path / 'nothing', nothing, {})
  loaded, about = subset.load(tmp_path / 'nothing')
  assert (loaded.positions, loaded.values, about) == ({}, {}, {})
  applied = subset.apply(loaded, seed)
  for a, b in zip(jax.tree.leaves(applied), jax.tree.leaves(seed), strict=True):
    assert a is b


def test_golden():
  # The documented format, for readers in other languages.
  seed = {'b': np.zeros(3, np.float32), 'a': np.zeros((2, 2), np.float32)}
  new = {'b': np.float32([0, 0, 5]), 'a': np.float32([[0, 1], [2, 0]])}
  arrays = subset.to_arrays(subset.extract(new, seed))
  assert arrays['paths'].tobytes() == b'a\nb'
  assert arrays['counts'].tolist() == [2, 1]
  assert arrays['positions'].tolist() == [1, 2, 2]
  assert arrays['values'].tolist() == [1, 2, 5]


def test_positions_beyond_32_bits(tmp_path):
  far = subset.Subset({'a': np.int64([3, 2**40])}, {'a': np.float32([1, 2])})
  subset.save(tmp_path / 'far', far, {})
  assert_equal(subset.load(tmp_path / 'far')[0], far)


def test_equal_subsets_give_equal_files(tmp_path, repository):
  code = (
    'import sys, numpy as np\n'
    'from dst_t5x import subset\n'
    'seed = {"b": np.zeros(99, np.float32), "a": np.zeros(9, np.float32)}\n'
    'new = {"b": np.arange(99, dtype=np.float32), "a": seed["a"] + 1}\n'
    'about = {name: 1 for name in set(map(str, range(20)))}\n'
    'subset.save(sys.argv[1], subset.extract(new, seed), about)\n'
  )
  for name in ('first', 'second'):
    done = subprocess.run(
      [sys.executable, '-c', code, tmp_path / name],
      cwd=repository,
      capture_output=True,
      text=True,
    )
    assert done.returncode == 0, done.stderr
  first, second = (tmp_path / n for n in ('first', 'second'))
  assert first.read_bytes() == second.read_bytes()


def _one(positions, values=None, path='logits'):
  if values is None:
    values = np.zeros(len(positions), np.float32)
  return subset.Subset({path: np.int64(positions)}, {path: values})


@pytest.mark.parametrize(
  ('bad', 'message'),
  [
    (_one([0], np.zeros(1, np.float16)), 'logits is float16, the seed has f'),
    (_one([0], path='logit'), 'subset: the seed has no tensor logit'),
    (_one([5, 24]), 'outside of the tensor, which has 24 components'),
    (_one([-1, 3]), 'a position of logits is outside of the tensor'),
    (_one([3, 3]), 'the positions of logits are not ascending'),
    (_one([4, 3]), 'the positions of logits are not ascending'),
    (_one([3, 4], np.zeros(1, np.float32)), 'logits has not one value for'),
  ],
)
def test_a_subset_of_another_network(bad, message):
  seed = _seed()
  before = jax.tree.map(np.copy, seed)
  with pytest.raises(errors.UserError, match=message) as error:
    subset.apply(bad, seed)
  assert '\n' not in str(error.value)
  assert_same(seed, before)


def test_a_seed_of_another_network():
  params, seed = _seed(), _seed()
  seed['logits'] = seed['logits'].reshape(4, 6)
  with pytest.raises(errors.UserError) as error:
    subset.extract(params, seed)
  assert str(error.value) == (
    'subset: logits is float32[2, 3, 4], the seed has float32[4, 6]'
  )
  del seed['logits']
  with pytest.raises(errors.UserError, match=r'logits .* the seed lacks it'):
    subset.extract(params, seed)
  params['scale'] = params['scale'].astype(np.float16)
  del params['logits']
  with pytest.raises(errors.UserError, match=r'float16\[\], the seed has fl'):
    subset.extract(params, seed)


@pytest.mark.parametrize(
  ('name', 'value'),
  [
    ('counts', np.int64([2, 2])),
    ('counts', np.int64([4, -1])),
    ('counts', np.int64([3])),
    ('positions', np.int64([1, 2])),
    ('values', np.zeros(4, np.float32)),
    ('paths', np.frombuffer(b'a\na', np.uint8)),
    ('paths', np.frombuffer(b'a\n\xff', np.uint8)),
    ('values', None),
  ],
)
def test_arrays_that_contradict_each_other(name, value):
  good = subset.Subset(
    {'a': np.int64([1, 2]), 'b': np.int64([0])},
    {'a': np.float32([1, 2]), 'b': np.float32([3])},
  )
  arrays = subset.to_arrays(good)
  assert_equal(subset.from_arrays(arrays), good)
  arrays[name] = value
  if value is None:
    del arrays[name]
  with pytest.raises(errors.UserError, match=r'^subset: it') as error:
    subset.from_arrays(arrays)
  assert '\n' not in str(error.value)


def _assert_refused(file):
  with pytest.raises(errors.UserError) as error:
    subset.load(file)
  assert str(file) in str(error.value)
  assert '\n' not in str(error.value)
  return str(error.value)


def test_what_is_no_subset_file(tmp_path):
  assert 'cannot read' in _assert_refused(tmp_path / 'missing')
  assert 'cannot read' in _assert_refused(tmp_path)
  file = tmp_path / 'file'
  arrays = subset.to_arrays(_one([1, 2]))
  for blob in (
    b'',
    b'hello',
    b'\xff' * 100,
    safetensors.numpy.save(arrays),
    safetensors.numpy.save(arrays, {'format': 'pt'}),
    safetensors.numpy.save(arrays, {'subset': 'no JSON'}),
    safetensors.numpy.save(arrays, {'subset': '[]'}),
    safetensors.numpy.save(arrays, {'subset': json.dumps({'format': 'x'})}),
  ):
    file.write_bytes(blob)
    _assert_refused(file)


def test_a_file_that_is_cut_anywhere(tmp_path):
  seed = _seed()
  file = tmp_path / 'file'
  subset.save(file, subset.extract(_tuned(seed), seed), {})
  whole = file.read_bytes()
  for length in range(0, len(whole), 7):
    file.write_bytes(whole[:length])
    _assert_refused(file)


def test_the_old_file_stays_when_the_disk_is_full(tmp_path, monkeypatch):
  file = tmp_path / 'file'
  subset.save(file, _one([1, 2]), {})
  before = file.read_bytes()
  subset.save(file, _one([1, 2]), {})
  assert os.listdir(tmp_path) == ['file']

  def full(descriptor):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(os, 'fsync', full)
  with pytest.raises(errors.UserError, match=r'cannot write .*No space left'):
    subset.save(file, _one([1, 2, 3]), {})
  assert os.listdir(tmp_path) == ['file']
  assert file.read_bytes() == before


def test_no_folder_to_write_into(tmp_path):
  file = pathlib.Path(tmp_path / 'missing' / 'file')
  with pytest.raises(errors.UserError, match='cannot write the subset file'):
    subset.save(file, _one([1]), {})
