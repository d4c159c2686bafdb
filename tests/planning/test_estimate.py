"""What a training command needs, against what the compiler plans."""

import math
import re

import commands
import pytest

from dst_t5x.config import binaries
from dst_t5x.core.errors import UserError
from dst_t5x.planning import estimate
from dst_t5x.planning import topologies
from dst_t5x.planning import work

# Digits of a count, and candidates of a pass, for each silo; see counting.py.
_SENT_FOR_A_SILO = 3 * 6


def _estimate(*arguments):
  """Returns the row of a command as name -> number, and the whole output."""
  out = commands.run('estimate', *arguments)
  [row] = [line for line in out.splitlines() if line.endswith(('yes', 'NO'))]
  *_, total, planned, fits = row.split()
  names = out.splitlines()[1].split()
  numbers = dict(zip(names[:6], map(float, row.split()[-9:-3]), strict=True))
  planned = None if planned == '-' else float(planned)
  return numbers | {'total': float(total), 'XLA': planned, 'fits': fits}, out


def _flags(model, method, **bindings):
  return [
    f'--gin_file=gin/models/{model}.gin',
    '--gin_file=gin/tasks/super_glue.gin',
    f'--gin_file=gin/methods/{method}.gin',
    '--gin_file=gin/runs/finetune.gin',
    *commands.flags(**bindings),
  ]


def _check_what_is_sent(out, silos):
  """The projection sends one vector a counting pass: numbers of each silo."""
  sent = re.search('the projection sends: (.*)', out)[1]
  assert sent.startswith('1 all-reduce of u32[')
  shapes = re.findall(r'u32\[([\d,]+)\]', sent)
  numbers = sum(math.prod(map(int, shape.split(','))) for shape in shapes)
  assert numbers == _SENT_FOR_A_SILO * silos


def test_eight_devices():
  # Activations outweigh a small model.
  row, out = _estimate(
    *_flags(
      't5_1_1_demo',
      'dst',
      DROPOUT_RATE=0.1,
      MODEL_PARALLELISM=2,
      BATCH_SIZE=256,
      TASK_FEATURE_LENGTHS={'inputs': 128, 'targets': 128},
      # Flags of training that change nothing here are understood.
      MODEL_DIR='/nowhere',
      INITIAL_CHECKPOINT_PATH='/nowhere',
    ),
    '--topology=v4:2x4',
  )
  assert (
    '8 device(s) of 32 GiB, 4 data × 1 fsdp × 2 model; 65,536 tokens' in out
  )
  assert row['total'] == pytest.approx(row['XLA'], rel=0.15)
  assert row['activations'] > 10 * row['gradients']
  _check_what_is_sent(out, silos=26)


def test_the_largest_does_not_fit_everywhere():
  flags = work.with_files(_flags('t5_1_1_xxl', 'dst', COMPILE=False))
  found = binaries.parse(flags, estimate.estimate)()
  assert found.memory.parameters == found.memory.seed == 4 * 11_135_332_352
  assert found.compiled is None
  for text, fits in (('v5p', 'NO'), ('h200', 'NO')):
    row = estimate._row('xxl', found, topologies.parse(text))
    assert row.endswith(fits)


@pytest.mark.slow
@pytest.mark.parametrize(
  'method',
  [
    *('full', 'dst', 'lora', 'dora', 'pissa', 'vera', 'prompt', 'ia3', 'norms'),
    'head_only',
  ],
)
def test_methods_that_recompute_nothing(method):
  row, _ = _estimate(
    *_flags(
      't5_1_1_small',
      method,
      DROPOUT_RATE=0.1,
      BATCH_SIZE=16,
      TASK_FEATURE_LENGTHS={'inputs': 128, 'targets': 64},
    ),
    '--topology=v4:1',
  )
  assert row['total'] == pytest.approx(row['XLA'], rel=0.15)


@pytest.mark.slow
def test_a_seed_in_bfloat16():
  row, _ = _estimate(
    *_flags(
      't5_1_1_small',
      'dst',
      SEED_DTYPE='bfloat16',
      BATCH_SIZE=16,
      TASK_FEATURE_LENGTHS={'inputs': 153, 'targets': 38},
    ),
    '--topology=cpu',
  )
  assert row['parameters'] == 0.0
  assert row['total'] == pytest.approx(row['XLA'], rel=0.15)


def _on_a_pod(model, method, topology, shared):
  """Estimates a step with 64 rows, in which the count and the plan agree."""
  row, out = _estimate(
    *_flags(
      model,
      method,
      MODEL_PARALLELISM=shared,
      BATCH_SIZE=64,
      TASK_FEATURE_LENGTHS={'inputs': 256, 'targets': 128},
    ),
    f'--topology={topology}',
  )
  assert row['total'] == pytest.approx(row['XLA'], rel=0.15)
  return row, out


@pytest.mark.slow
@pytest.mark.parametrize(
  ('model', 'topology', 'shared'),
  [('t5_1_1_xl', 'v4:2x2x4', 4), ('t5_1_1_xxl', 'v4:4x4x4', 16)],
)
def test_the_papers_topologies(model, topology, shared):
  row, out = _on_a_pod(model, 'dst', topology, shared)
  assert row['fits'] == 'yes'
  _check_what_is_sent(out, silos=246)


@pytest.mark.slow
@pytest.mark.parametrize('method', ['dst', 'lora'])
@pytest.mark.parametrize(
  ('model', 'topology', 'shared'),
  [
    ('llama3_2_1b', 'v4:2x2x4', 4),
    ('llama3_1_8b', 'v4:4x4x4', 4),
    ('gemma2_27b', 'v4:4x4x4', 16),
  ],
)
def test_decoder_only_models(model, topology, shared, method):
  _on_a_pod(model, method, topology, shared)


def test_all_sizes_and_methods():
  def count(*files):
    found = estimate._variants([f'--gin_file={file}' for file in files])
    assert len({name for name, _ in found}) == len(found)
    return len(found)

  xl, dst = 'gin/models/t5_1_1_xl.gin', 'gin/methods/dst.gin'
  assert count(xl, dst) == 1
  assert count(f'/home/me/{xl}', dst) == 1
  assert count(xl) == 27
  assert count(dst) == 5
  assert count() == 135
  assert count('mine.gin') == 1
  assert count(xl, 'gin/runs/pretrain.gin') == 1


@pytest.mark.parametrize(
  ('text', 'devices', 'kind'),
  [
    ('v4:4x4x4', 64, 'v4'),
    ('v5e:2x2', 4, 'v5e'),
    ('h200:8', 8, 'h200'),
    ('V3:4x4', 32, 'v3'),  # Two cores a chip, a device each.
    ('cpu', 1, 'cpu'),
  ],
)
def test_topologies(text, devices, kind):
  found = topologies.parse(text)
  assert (found.devices, found.kind) == (devices, kind)
  assert found.accelerator.memory > 2**30


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('v5:4', "no accelerator 'v5'; did you mean 'v5p'"),
    ('v4:4x', 'write v4:8, or the shape'),
    ('v4:0', 'write v4:8'),
    ('v4:4y4', 'write v4:8'),
  ],
)
def test_no_topology(text, message):
  with pytest.raises(UserError, match=message):
    topologies.parse(text)
