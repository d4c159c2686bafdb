"""What programs send, and that none replicates an array on all devices."""

import json
import os
import subprocess
import sys

import commands
import pytest

from dst_t5x.planning import collectives
from dst_t5x.planning import traffic

_SUM = 'replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add'
_PROGRAM = """
%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}

%promoted (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}

%narrowed (p: f32[2,4]) -> f32[2,4] {
  %p = f32[2,4]{1,0} parameter(0)
  %low = bf16[2,4]{1,0} convert(%p)
  ROOT %high = f32[2,4]{1,0} convert(%low)
}

%sliced (p: f32[8,4], i: s32[]) -> bf16[2,4] {
  %p = f32[8,4]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = f32[2,4]{1,0} dynamic-slice(%p, %i, %zero), dynamic_slice_sizes={2,4}
  ROOT %low = bf16[2,4]{1,0} convert(%slice)
}

%body (x: (s32[], f32[2,4])) -> (s32[], f32[2,4]) {
  %x = (s32[], f32[2,4]{1,0}) parameter(0)
  %n = s32[] get-tuple-element(%x), index=0
  %y = f32[2,4]{1,0} get-tuple-element(%x), index=1
  %narrow = f32[2,4]{1,0} fusion(%y), kind=kLoop, calls=%narrowed
  %whole = f32[8,4]{1,0} all-gather(%narrow), replica_groups=[2,4]<=[8], \
dimensions={0}, metadata={op_name="jit(f)/jvp(T)/while/body/mlp/wi_0/dot"}
  ROOT %next = (s32[], f32[2,4]{1,0}) tuple(%n, %y)
}

%condition (x: (s32[], f32[2,4])) -> pred[] {
  %x = (s32[], f32[2,4]{1,0}) parameter(0)
  ROOT %more = pred[] constant(true)
}

ENTRY %main (p: f32[8,4], q: (s32[], f32[2,4]), i: s32[]) -> f32[8,4] {
  %p = f32[8,4]{1,0} parameter(0)
  %q = (s32[], f32[2,4]{1,0}) parameter(1)
  %i = s32[] parameter(2)
  %loop = (s32[], f32[2,4]{1,0}) while(%q), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"5"}}
  %all = (f32[8,4]{1,0}, f32[8,4]{1,0}) all-reduce(%p, %p), SUM
  %one = f32[8,4]{1,0} get-tuple-element(%all), index=0
  %two = f32[8,4]{1,0} get-tuple-element(%all), index=1
  %part = bf16[2,4]{1,0} fusion(%one, %i), kind=kLoop, calls=%sliced
  %three = f32[8,4]{1,0} all-reduce(%p), SUM
  %total = f32[8,4]{1,0} add(%two, %three)
  %four = f32[8,4]{1,0} all-reduce(%p), \
replica_groups=mesh['x'=2,'y'=4] {'x'}, to_apply=%promoted
  ROOT %result = f32[8,4]{1,0} multiply(%total, %four)
}
""".replace('SUM', _SUM)


def test_what_a_program_sends():
  sent = collectives.sent(_PROGRAM)
  whole = 8 * 4 * 4
  assert sorted(
    (one.operation, one.bytes, one.bytes_as_is) for one in sent
  ) == [
    # Five times, in bfloat16.
    ('all-gather', 5 * whole / 2 * 3 / 4, 5 * whole / 2 * 3 / 4),
    # One of two sums that are added up.
    ('all-reduce', 0.0, 2 * whole * 3 / 4),
    # Two devices, in bfloat16, though a CPU computes it in float32.
    ('all-reduce', 2 * whole / 2 / 2, 2 * whole / 2 / 2),
    ('all-reduce', 2 * whole * 3 / 4, 2 * whole * 3 / 4),
    # Each device needs a fourth of the sum.
    ('reduce-scatter', whole * 3 / 4, 2 * whole * 3 / 4),
  ]
  [gather] = (row for row in traffic.rows(_PROGRAM) if 'gather' in row[0])
  assert gather.cause == 'forward, mlp/wi_0'


@pytest.mark.slow
@pytest.mark.parametrize(
  ('model', 'topology'),
  [
    ('t5_1_1_xxl', 'v4:2x2x4'),
    ('gemma2_9b', 'v4:4x4x4'),
    ('gemma3_1b', 'v5e:2x2'),
    ('llama3_1_8b', 'h200:8'),
  ],
)
def test_no_program_replicates_an_array(repository, tmp_path, model, topology):
  file = tmp_path / 'replicated.json'
  subprocess.run(
    [
      *(sys.executable, repository / 'benchmarks' / 'collectives.py'),
      *(model, topology, '--replicated', '--json', file),
    ],
    env=os.environ | {'PYTHONPATH': str(repository)},
    check=True,
    timeout=2 * commands.TIMEOUT,
  )
  rows = json.loads(file.read_text())
  assert len(rows) == 4
  assert not any(row['replicated'] for row in rows), rows
