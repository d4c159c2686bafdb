"""Runs with SEED_DTYPE = 'bfloat16' write what those with float32 write."""

import commands
import pytest

from dst_t5x.checkpoints import conversion
from dst_t5x.core.errors import UserError


@pytest.fixture(scope='module')
def rounded(toy_seed, tmp_path_factory):
  """The toy seed, rounded to bfloat16."""
  folder = tmp_path_factory.mktemp('rounded') / 'seed'
  said = conversion.convert(toy_seed, folder, 't5x', as_bfloat16=True)
  assert 'rounded to bfloat16' in said
  return folder


def _flags(folder, steps, dtype, **more):
  return commands.flags(
    MODEL_DIR=folder,
    TRAIN_STEPS=steps,
    SEED_DTYPE=dtype,
    EVAL_EXAMPLES=4,
    LOG_PERIOD=2,
    **more,
  )


def _left(folder):
  """Returns what a run wrote: its subset or adapter, and its metrics."""
  rows = (folder / 'metrics.jsonl').read_text().splitlines()
  rows = [row for row in rows if 'speed/' not in row]
  return (folder / 'last.dst').read_bytes(), rows[-1]


def test_a_run_in_parts_is_one_in_float32(rounded, tmp_path):
  arguments = commands.dst(rounded)
  commands.call('train', *arguments, *_flags(tmp_path / 'run', 8, 'float32'))
  for steps, dtype in ((3, 'float32'), (6, 'bfloat16'), (8, 'bfloat16')):
    flags = _flags(tmp_path / 'parts', steps, dtype)
    commands.call('train', *arguments, *flags)
  assert _left(tmp_path / 'parts') == _left(tmp_path / 'run')


@pytest.mark.slow
@pytest.mark.parametrize('method', ['fish', 'lora', 'vera', 'head_only'])
def test_methods_in_two_parts(method, rounded, tmp_path):
  # FISH has two phases, of which the first changes nothing.
  more = ['--gin.SCORE_STEPS=4'] if method == 'fish' else []
  arguments = [*commands.finetune(rounded, method), *more]
  commands.call('train', *arguments, *_flags(tmp_path / 'run', 8, 'float32'))
  for steps in 3, 8:
    flags = _flags(tmp_path / 'parts', steps, 'bfloat16')
    commands.call('train', *arguments, *flags)
  one, other = (
    commands.fingerprint(tmp_path / name) for name in ('run', 'parts')
  )
  assert one == other


@pytest.mark.slow
def test_eight_devices(rounded, tmp_path):
  flags = commands.xla_flags('--xla_force_host_platform_device_count=8')
  for dtype in 'float32', 'bfloat16':
    more = _flags(tmp_path / dtype, 5, dtype, FSDP=2, MODEL_PARALLELISM=2)
    commands.run(
      'train',
      *commands.dst(rounded),
      *more,
      environment={'XLA_FLAGS': flags},
    )
  assert _left(tmp_path / 'bfloat16') == _left(tmp_path / 'float32')


def test_a_seed_that_bfloat16_rounds_is_refused(toy_seed, tmp_path):
  folder = tmp_path / 'run'
  flags = _flags(folder, 2, 'bfloat16')
  with pytest.raises(UserError, match='--dtype=bfloat16'):
    commands.call('train', *commands.dst(toy_seed), *flags)
  assert not (folder / 'run.json').exists()


def test_full_finetuning_is_refused(rounded, tmp_path):
  flags = _flags(tmp_path / 'run', 2, 'bfloat16')
  with pytest.raises(UserError, match='can change all parameters'):
    commands.call('train', *commands.finetune(rounded, 'full'), *flags)
