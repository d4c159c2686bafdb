"""What a sweep's file expands to, and what is wrong with it."""

import itertools

import pytest

from dst_t5x.errors import UserError
from launch import grid

_TWO = """
model: [tiny, /data/mine.gin]
task: gsm8k
TRAIN_STEPS: 1000
INITIAL_CHECKPOINT_PATH: gs://bucket/{model}
grids:
- method: dst
  EPSILON: [1e-6, 1e-4]
  SILOS: ["'none'"]
- method: full
"""


def _read(tmp_path, text, *flags):
  path = tmp_path / 'sweep.yaml'
  path.write_text(text)
  return grid.read(str(path), flags)


def test_grids_inherit_and_names_tell(tmp_path):
  runs = _read(tmp_path, _TWO)
  assert [run.name for run in runs] == [
    f'{model}_gsm8k_{rest}'
    for model, rest in itertools.product(
      ('tiny', 'mine'),
      (
        'dst_epsilon=1e-6_silos=none',
        'dst_epsilon=1e-4_silos=none',
        'full',
      ),
    )
  ]
  assert runs[0].flags('runs/x') == [
    '--gin_file=gin/models/t5_1_1_tiny.gin',
    '--gin_file=gin/tasks/gsm8k.gin',
    '--gin_file=gin/methods/dst.gin',
    '--gin_file=gin/runs/finetune.gin',
    '--gin.TRAIN_STEPS=1000',
    '--gin.INITIAL_CHECKPOINT_PATH=gs://bucket/tiny',
    '--gin.EPSILON=1e-6',
    "--gin.SILOS='none'",
    "--gin.MODEL_DIR='runs/x'",
  ]
  assert runs[-1].flags('x')[0] == '--gin_file=/data/mine.gin'
  assert '--gin.INITIAL_CHECKPOINT_PATH=gs://bucket/mine' in runs[-1].flags('x')


def test_a_longer_list_renames_nothing(tmp_path):
  short = _read(tmp_path, 'method: dst\nEPSILON: [1e-4]\n')
  long = _read(tmp_path, 'method: dst\nEPSILON: [1e-5, 1e-4]\n')
  assert short[0] == long[1]


def test_flags_override_the_file_and_its_axes(tmp_path):
  runs = _read(
    tmp_path, _TWO, '--gin.TRAIN_STEPS=7', '--gin.EPSILON=0.5', '--task=wmt'
  )
  assert [run.name for run in runs] == [
    'tiny_wmt_dst_silos=none',
    'tiny_wmt_full',
    'mine_wmt_dst_silos=none',
    'mine_wmt_full',
  ]
  assert runs[0].train_steps == 7
  assert runs[0].settings['EPSILON'] == '0.5'


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('a: [', ':1: '),
    ('- a', "`key: value` is wanted, not ['a']"),
    ('methd: dst', "'methd' is none of .* did you mean 'method'"),
    ('method:', 'method has no value'),
    ('EPSILON: []', 'EPSILON has no values'),
    ('EPSILON: 1\nEPSILON: 2', ':2: EPSILON is there twice'),
    ("METRICS: [['bleu']]", 'METRICS holds .* as text, in quotes'),
    ('grids: {method: dst}', 'grids must be a list'),
    ('X: "{modl}"\nmodel: tiny', "{modl} is no key .* did you mean 'model'"),
    (
      'method: dst\ngrids:\n- {SILOS: a}\n- {SILOS: b}',
      'two runs are called dst; they differ in SILOS',
    ),
    (f'X: [{300 * "x"}]', 'too long'),
  ],
)
def test_mistakes_have_one_line(tmp_path, text, message):
  with pytest.raises(UserError, match=message.replace('[', r'\[')) as raised:
    _read(tmp_path, text)
  assert '\n' not in str(raised.value)


def test_a_misspelt_sweep(tmp_path):
  with pytest.raises(UserError, match=r"did you mean 'launch/sweeps/figure_1"):
    grid.read('launch/sweeps/figur_1.yaml')
