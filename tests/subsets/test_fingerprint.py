"""The hash that identifies a model."""

import hashlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny_t5

from dst_t5x.checkpoints import t5x_checkpoint
from dst_t5x.core import stacking
from dst_t5x.subsets import fingerprint as fingerprint_lib

fingerprint = fingerprint_lib.fingerprint


def test_is_what_the_docstring_says():
  params = {
    'b': {'w': np.asarray([[1.0, -2.0, 0.5]], np.float32)},
    'a': np.asarray(7, np.int32),
  }
  lines = (
    f'a int32  {hashlib.sha256(bytes([7, 0, 0, 0])).hexdigest()}\n'
    'b/w float32 1,3 '
    f'{hashlib.sha256(bytes.fromhex("0000803f000000c00000003f")).hexdigest()}\n'
  )
  assert fingerprint(params) == hashlib.sha256(lines.encode()).hexdigest()


def test_does_not_depend_on_how_the_arrays_are_held():
  params = tiny_t5.random_params()
  expected = fingerprint(params)
  assert fingerprint(dict(reversed(params.items()))) == expected
  assert fingerprint(jax.tree.map(jnp.asarray, params)) == expected
  assert fingerprint(jax.tree.map(np.asfortranarray, params)) == expected
  big_endian = jax.tree.map(lambda array: array.astype('>f4'), params)
  assert fingerprint(big_endian) == expected


def test_stacked_tree_has_the_hash_of_the_unstacked():
  params = tiny_t5.random_params()
  stacked = stacking.stack_layers(params)
  assert 'layers' in stacked['encoder']
  assert fingerprint(stacked) == fingerprint(params)
  assert fingerprint(jax.tree.map(jnp.asarray, stacked)) == fingerprint(params)


def test_any_bit_changes_it():
  params = {'w': np.zeros((3, 2), np.float32)}
  seen = {fingerprint(params)}
  for bit in range(8 * params['w'].nbytes):
    flipped = params['w'].copy()
    flipped.reshape(-1).view(np.uint8)[bit // 8] ^= 1 << (bit % 8)
    seen.add(fingerprint({'w': flipped}))
  assert len(seen) == 1 + 8 * params['w'].nbytes


def test_sign_of_zero_and_payload_of_nan_change_it():
  words = np.asarray([0, 0x80000000, 0x7FC00000, 0x7FC00001], np.uint32)
  hashes = {fingerprint({'w': word.view(np.float32)}) for word in words}
  assert len(hashes) == 4


def test_name_shape_and_type_change_it():
  zeros = np.zeros(4, np.float32)
  others = [
    {'v': zeros},
    {'w': zeros.reshape(2, 2)},
    {'w': zeros.view(np.int32)},
    {'w': np.zeros(8, ml_dtypes.bfloat16)},
    {'w': np.zeros(8, np.float16)},
    {'w': zeros, 'v': zeros},
  ]
  assert len({fingerprint(tree) for tree in [{'w': zeros}, *others]}) == 7


def _command(*arguments):
  return subprocess.run(
    [sys.executable, '-m', 'dst_t5x.fingerprint', *map(str, arguments)],
    capture_output=True,
    text=True,
    check=False,
  )


def test_command_prints_one_line(tmp_path):
  params = tiny_t5.random_params()
  t5x_checkpoint.save(tmp_path, params, step=12)
  done = _command(tmp_path)
  assert done.returncode == 0
  assert done.stdout == f'12 {fingerprint(params)}\n'


def test_command_names_what_is_wrong(tmp_path):
  (tmp_path / 'checkpoints').mkdir()
  done = _command(tmp_path / 'chekpoints')
  assert done.returncode == 1
  assert done.stdout == ''
  assert done.stderr.startswith('error: ')
  assert "did you mean 'checkpoints'?" in done.stderr
  assert done.stderr.count('\n') == 1


def test_command_needs_one_folder():
  assert _command().returncode == 2


@pytest.mark.parametrize('module', ['tensorflow', 'torch', 'transformers'])
def test_command_does_not_import(tmp_path, module):
  t5x_checkpoint.save(tmp_path, tiny_t5.random_params(), step=1)
  code = (
    'import sys; from dst_t5x import fingerprint;'
    f'fingerprint.main([{str(tmp_path)!r}]);'
    f'sys.exit({module!r} in sys.modules)'
  )
  subprocess.run([sys.executable, '-c', code], check=True)
