"""The command that converts between T5X's format and Hugging Face's."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_t5

from dst_t5x.checkpoints import conversion
from dst_t5x.checkpoints import hf_checkpoint
from dst_t5x.checkpoints import t5x_checkpoint
from dst_t5x.core import errors
from dst_t5x.subsets import fingerprint


@pytest.fixture
def source(tmp_path):
  t5x_checkpoint.save(tmp_path / 'source', tiny_t5.random_params(), step=12)
  return tmp_path / 'source'


def _command(*arguments):
  return subprocess.run(
    [sys.executable, '-m', 'dst_t5x.convert', *map(str, arguments)],
    capture_output=True,
    text=True,
    check=False,
  )


def test_there_and_back(source, tmp_path):
  params = tiny_t5.random_params()
  done = _command(source, tmp_path / 'hf', '--format=hf')
  assert done.returncode == 0, done.stderr
  assert done.stdout.count('\n') == 1
  assert str(tmp_path / 'hf') in done.stdout
  assert fingerprint.fingerprint(params) in done.stdout
  assert (
    hf_checkpoint.model_of(tmp_path / 'hf').network.config == tiny_t5.CONFIG
  )
  conversion.convert(tmp_path / 'hf', tmp_path / 't5x', 't5x')
  loaded = t5x_checkpoint.load(tmp_path / 't5x')
  assert loaded.step == 0
  tiny_t5.assert_same_bits(loaded.params, params)


def test_values_rounded_to_bfloat16(source, tmp_path):
  done = _command(source, tmp_path / 'hf', '--format=hf', '--dtype=bfloat16')
  assert done.returncode == 0, done.stderr
  assert 'rounded to bfloat16' in done.stdout
  loaded = hf_checkpoint.load(tmp_path / 'hf')
  assert loaded.is_bfloat16
  params = tiny_t5.random_params()
  expected = jax.tree.map(
    lambda x: x.astype(jnp.bfloat16).astype(np.float32), params
  )
  tiny_t5.assert_same_bits(loaded.params, expected)
  # Twice is once.
  conversion.convert(tmp_path / 'hf', tmp_path / 't5x', 't5x', as_bfloat16=True)
  again = t5x_checkpoint.load(tmp_path / 't5x')
  tiny_t5.assert_same_bits(again.params, expected)


def test_an_adapter_is_not_rounded(source, tmp_path):
  with pytest.raises(errors.UserError, match='--dtype rounds whole models'):
    conversion.convert(source, tmp_path / 'peft', 'peft', as_bfloat16=True)


def test_real_checkpoint(shared_data, tmp_path):
  real = shared_data / 'checkpoints/t5_1_1_tiny_legacy/checkpoint_3'
  conversion.convert(real, tmp_path / 'hf', 'hf')
  loaded = hf_checkpoint.load(tmp_path / 'hf')
  tiny_t5.assert_same_bits(loaded.params, t5x_checkpoint.load(real).params)
  assert hf_checkpoint.model_of(tmp_path / 'hf').network.config.num_heads == 2


def test_target_is_never_overwritten(source, tmp_path):
  target = tmp_path / 'hf'
  target.mkdir()
  (target / 'mine').write_text('mine')
  done = _command(source, target, '--format=hf')
  assert done.returncode == 1
  assert done.stderr.startswith('error: ')
  assert 'exists already' in done.stderr
  assert [file.name for file in target.iterdir()] == ['mine']


def test_missing_source(tmp_path):
  done = _command(tmp_path / 'nothing', tmp_path / 'hf', '--format=hf')
  assert done.returncode == 1
  assert done.stderr.startswith('error: there is no ')


def test_unknown_format(source, tmp_path):
  assert _command(source, tmp_path / 'x', '--format=onnx').returncode == 2


def test_what_is_no_t5_cannot_become_one(tmp_path):
  t5x_checkpoint.save(tmp_path / 's', {'w': np.ones(3, np.float32)}, step=1)
  with pytest.raises(errors.UserError, match=r'no T5 1\.1'):
    conversion.convert(tmp_path / 's', tmp_path / 'hf', 'hf')
