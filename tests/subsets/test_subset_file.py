"""Subset files: there and back, small, as documented and as predicted."""

import hashlib
import os
import pathlib
import re
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import subsets

from dst_t5x import subsets as subset
from dst_t5x.core import errors
from dst_t5x.subsets import content
from dst_t5x.subsets import definition
from dst_t5x.subsets import fingerprint
from dst_t5x.subsets import table

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16, np.float64]


def _found(dtype=np.float32):
  seed = subsets.seed_tree(dtype)
  params = subsets.tuned_tree(seed)
  return seed, params, subset.extract(params, seed)


def _about(seed, **others):
  return {'seed': {'fingerprint': fingerprint.fingerprint(seed)}, **others}


@pytest.mark.parametrize('dtype', DTYPES)
def test_there_and_back(dtype, tmp_path):
  seed, params, found = _found(dtype)
  about = _about(seed, epsilon=1e-4, step=7, scores={'bleu': 31.5})
  file = tmp_path / 'a.dst'
  size = subset.save(file, found, about)
  assert size == file.stat().st_size
  loaded, loaded_about = subset.load(str(file))
  subsets.assert_equal(loaded, found)
  assert loaded.fingerprint == about['seed']['fingerprint']
  assert loaded_about == about
  subsets.assert_same(subset.apply(loaded, seed), params)
  assert subset.to_bytes(loaded, loaded_about) == file.read_bytes()


@pytest.mark.parametrize('identity', [None, 'a' * 64])
def test_as_an_array(identity):
  seed, params, _ = _found()
  for tuned in (params, seed):
    found = subset.extract(tuned, seed, identity)
    arrays = subset.to_arrays(found)
    # What Orbax can store.
    assert all(array.size for array in arrays.values())
    again = subset.from_arrays(arrays)
    subsets.assert_equal(again, found)
    assert again.fingerprint == identity
  arrays['subset'] = arrays['subset'][:-1]
  for bad in (arrays, {'positions': np.zeros(3)}, {}):
    with pytest.raises(errors.UserError, match=r'^subset: '):
      subset.from_arrays(bad)


def test_several_types_in_one_file():
  seed = {
    'a': np.zeros(3, ml_dtypes.bfloat16),
    'b': np.zeros(5, np.float32),
    'c': np.zeros(2, np.float16),
  }
  params = jax.tree.map(lambda x: x + x.dtype.type(1.5), seed)
  found = subset.extract(params, seed)
  loaded, _ = subset.from_bytes(subset.to_bytes(found, _about(seed)))
  subsets.assert_equal(loaded, found)


def test_the_empty_subset(tmp_path):
  seed = subsets.seed_tree()
  subset.save(tmp_path / 'nothing', subset.extract(seed, seed), _about(seed))
  loaded, _ = subset.load(tmp_path / 'nothing')
  assert (loaded.positions, loaded.values) == ({}, {})


def test_golden():
  # Files of this version stay readable, and are written the same everywhere.
  seed = {
    'encoder': {
      f'layers_{i}': {'w': np.zeros((2, 3), np.float32)} for i in range(11)
    },
    'b': np.zeros(3, np.float32),
  }
  params = jax.tree.map(np.copy, seed)
  params['encoder']['layers_2']['w'][1] = 0.5, -2, 3
  params['encoder']['layers_10']['w'][0, 1] = 1
  params['b'][2] = 5
  found = subset.extract(params, seed, 'a1' * 32)
  blob = subset.to_bytes(found, {'task': 'Käse', 'epsilon': 0.1})
  arrays = content.to_arrays(found)
  assert arrays['tensors'].tobytes() == (
    b'b float32 3\nencoder/layers/w float32 11,2,3\n'
  )
  # Positions 2, 3 + 2 · 6 + 1 (layer 10 is third), 3 + 3 · 6 + 3, 4, 5 of 69.
  # Gaps 2, 13, 7, 0, 0; k = 3.
  assert arrays['quotients'].tolist() == [0b111101]
  assert arrays['remainders'].tolist() == [[0b00110], [0b00101], [0b00110]]
  assert arrays['values'].view('<f4').tolist() == [5, 1, 0.5, -2, 3]
  assert hashlib.sha256(blob).hexdigest() == _GOLDEN


_GOLDEN = '5550792a639a0da974b03809d81a42e599cfe6968aa8eea8fb403edfad4a2333'


def test_equal_subsets_give_equal_files(tmp_path, repository):
  code = (
    'import sys, numpy as np\n'
    'from dst_t5x import subsets as subset\n'
    'seed = {"b": np.zeros(99, np.float32), "a": np.zeros(9, np.float32)}\n'
    'new = {"b": np.arange(99, dtype=np.float32), "a": seed["a"] + 1}\n'
    'about = {name: {name: 1} for name in set(map(str, range(20)))}\n'
    'found = subset.extract(new, seed, "a" * 64)\n'
    'subset.save(sys.argv[1], found, about)\n'
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


def test_metadata_are_made_plain():
  seed, _, found = _found()
  about = _about(
    seed,
    scores={'bleu': np.float32(0.5), 'rouge': float('nan')},
    silos=(('.*', 'all'),),
    path=pathlib.PurePosixPath('/a'),
    step=np.int64(3),
  )
  _, loaded = subset.from_bytes(subset.to_bytes(found, about))
  assert loaded == {
    **_about(seed),
    'scores': {'bleu': 0.5, 'rouge': None},
    'silos': [['.*', 'all']],
    'path': '/a',
    'step': 3,
  }


def test_the_documented_reader(repository, tmp_path):
  document = (repository / 'docs/subset_format.md').read_text()
  (code,) = re.findall(r'```python\n(.*?)```', document, re.DOTALL)
  assert len(code.splitlines()) <= 40
  imported = set(re.findall(r'^import (.*)$', code, re.MULTILINE))
  assert imported == {
    'hashlib, json, math, re',
    'numpy as np',
    'safetensors.numpy',
  }
  names = {}
  exec(code, names)
  seed = subsets.seed_tree()
  nothing = seed, seed, subset.extract(seed, seed)
  for seed, _, found in (nothing, *map(_found, DTYPES)):
    about = _about(seed, task='gsm8k')
    subset.save(tmp_path / 'a.dst', found, about)
    tensors, read_about = names['read'](tmp_path / 'a.dst')
    assert read_about == about
    assert list(tensors) == list(found.tensors)
    for path, (shape, positions, values) in tensors.items():
      assert tuple(shape) == found.tensors[path].shape
      expected = found.positions.get(path, np.zeros(0, int))
      assert positions.tolist() == expected.tolist()
      expected = found.values.get(path, np.zeros(0))
      assert values.tobytes() == expected.tobytes()


def test_another_reader_of_safetensors_opens_it(tmp_path):
  _, _, found = _found()
  blob = subset.to_bytes(found, {'seed': {'fingerprint': 'a' * 64}})
  arrays = safetensors.numpy.load(blob)
  for name, array in content.to_arrays(found).items():
    assert arrays[name].tobytes() == array.tobytes()
    assert arrays[name].shape == array.shape
  assert arrays['sha256'].tobytes() == hashlib.sha256(blob[:-32]).digest()


@pytest.mark.parametrize(
  ('bad', 'message'),
  [
    (subsets.one([3, 3]), 'the positions of logits are not ascending'),
    (subsets.one([3, 24]), 'outside of the tensor'),
    (subsets.one([0], np.float32([np.nan])), 'value of logits is not finite'),
    (subsets.one([0], np.float32([np.inf])), 'value of logits is not finite'),
    (subsets.one([0], path='logit'), 'it has no tensor logit'),
    (
      subsets.one(
        [0],
        np.zeros(1, np.int32),
        tensors={'logits': definition.TensorType((3,), np.int32)},
      ),
      'logits is int32; a file holds bfloat16, float16, float32, float64',
    ),
    (
      subsets.one([], tensors={'a\nb': definition.TensorType((), np.float32)},
                  path='a\nb'),
      r"a file cannot hold a tensor called 'a\nb'",
    ),
  ],
)  # fmt: skip
def test_what_no_file_can_hold(bad, message, tmp_path):
  with pytest.raises(errors.UserError) as error:
    subset.save(tmp_path / 'a.dst', bad, {})
  assert message in str(error.value)
  assert os.listdir(tmp_path) == []


def test_a_file_says_of_which_seed_it_is(tmp_path):
  _, _, found = _found()
  for about in ({}, {'seed': None}, {'seed': {'fingerprint': 'abc'}}):
    with pytest.raises(errors.UserError, match='fingerprint'):
      subset.save(tmp_path / 'a.dst', found, about)
  known = subset.extract(*_found()[1::-1], 'b' * 64)
  with pytest.raises(errors.UserError, match=r'fingerprint, one'):
    subset.save(tmp_path / 'a.dst', known, {'seed': {'fingerprint': 'c' * 64}})
  subset.save(tmp_path / 'a.dst', known, {'seed': {'name': 'toy'}})
  assert subset.load(tmp_path / 'a.dst')[1] == {
    'seed': {'name': 'toy', 'fingerprint': 'b' * 64}
  }


def test_metadata_that_no_reader_would_take(tmp_path):
  _, _, found = _found()
  about = {'seed': {'fingerprint': 'a' * 64}, 'task': 'x' * 2**20}
  with pytest.raises(errors.UserError, match='more than a file can hold'):
    subset.save(tmp_path / 'a.dst', found, about)
  subset.save(tmp_path / 'a.dst', found, about | {'task': 'x' * 2**19})
  assert subset.load(tmp_path / 'a.dst')[1]['task'] == 'x' * 2**19


def test_the_old_file_stays_when_the_disk_is_full(tmp_path, monkeypatch):
  file = tmp_path / 'file'
  subset.save(file, subsets.one([1, 2]), {})
  before = file.read_bytes()
  subset.save(file, subsets.one([1, 2]), {})
  assert os.listdir(tmp_path) == ['file']

  def full(descriptor):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(os, 'fsync', full)
  with pytest.raises(errors.UserError, match=r'cannot write .*No space left'):
    subset.save(file, subsets.one([1, 2, 3]), {})
  assert os.listdir(tmp_path) == ['file']
  assert file.read_bytes() == before


def test_no_folder_to_write_into(tmp_path):
  file = pathlib.Path(tmp_path / 'missing' / 'file')
  with pytest.raises(errors.UserError, match='cannot write the subset file'):
    subset.save(file, subsets.one([1]), {})


@pytest.mark.parametrize(
  'tensors',
  [
    {'a': (3,), 'b/layers_0/w': (2,), 'b/layers_1/w': (2,)},
    {'a/layers_0/w': (2,), 'a/layers_1/w': (3,)},
    {'a/layers_1/w': (2,)},
    {'a/layers_00/w': (2,), 'a/layers_1/w': (2,)},
    {'layers/s': ()},
    {f'layers_{i}/x/layers_0/y': (2, 2) for i in range(12)},
    {'a b c/ü': (), 'empty': (0, 3)},
    {},
  ],
)
def test_tables_there_and_back(tensors):
  types = {
    path: definition.TensorType(shape, np.float32)
    for path, shape in tensors.items()
  }
  found = table.from_text(table.to_text(types))
  assert found == types
  assert list(found) == sorted(types)


def test_a_table_that_cannot_be_told():
  for paths in (['layers_0/s', 'layers/s'], ['a/layers/b']):
    shape = (2,) if len(paths) == 1 else ()
    tensor = definition.TensorType(shape, np.float32)
    with pytest.raises(errors.UserError, match='taken for stacked layers'):
      table.to_text(dict.fromkeys(paths, tensor))


@pytest.mark.parametrize('dtype', [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize('epsilon', [1e-4, 1e-3, 1e-2, 1e-1])
@pytest.mark.parametrize('clustered', [False, True])
def test_the_predicted_size(dtype, epsilon, clustered):
  random = np.random.default_rng(0)
  seed = {
    'embedding': np.zeros((3000, 64), dtype),
    'encoder': {
      f'layers_{i}': {'w': np.zeros((128, 256), dtype)} for i in range(8)
    },
  }
  found, _ = subsets.random_subset(seed, epsilon, random, clustered)
  about = {'epsilon': epsilon, 'seed': {'name': 'random'}}
  size = len(subset.to_bytes(found, about))
  predicted = subset.predicted_bytes(seed, found.size, about)
  # With float32 the bound is 5 %; bfloat16 in clusters saves up to 6 %.
  most = 0.06 if clustered and dtype != np.float32 else 0.05
  assert predicted == pytest.approx(size, rel=most if clustered else 0.01)


def test_the_predicted_size_of_nothing():
  seed = subsets.seed_tree()
  nothing = subset.extract(seed, seed, 'a' * 64)
  assert subset.predicted_bytes(seed, 0) == len(subset.to_bytes(nothing, {}))
