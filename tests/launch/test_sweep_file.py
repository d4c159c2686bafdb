"""What a sweep's file expands to, and what is wrong with it."""

import itertools

import pytest

from dst_t5x.core.errors import UserError
from dst_t5x.launch import grid

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


# The same as gin.
_TWO_IN_GIN = """
model = ['tiny', '/data/mine.gin']
task = 'gsm8k'
TRAIN_STEPS = 1000
INITIAL_CHECKPOINT_PATH = 'gs://bucket/{model}'
dst/method = 'dst'
dst/EPSILON = [1e-6, 1e-4]
dst/SILOS = ['none']
full/method = 'full'
"""


def _read(tmp_path, text, *flags, kind='yaml'):
  path = tmp_path / f'sweep.{kind}'
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


@pytest.mark.parametrize('flags', [(), ('--gin.EPSILON=0.5', '--task=wmt')])
def test_gin_and_yaml_say_the_same(tmp_path, flags):
  runs = _read(tmp_path, _TWO_IN_GIN, *flags, kind='gin')
  assert runs == _read(tmp_path, _TWO, *flags)


@pytest.mark.parametrize(
  ('in_gin', 'in_yaml'),
  [
    # Numbers stay as they are written, as the names of runs do.
    ('X = [1e-4, 0.0001, -2, 10_000]', 'X: [1e-4, 0.0001, -2, 10_000]'),
    ("X = ['plain', 'a/b', '1e-4']", 'X: [plain, a/b, "\'1e-4\'"]'),
    ('X = [True, None, "none"]', "X: ['True', 'None', \"'none'\"]"),
    ("X = [['a', 1e-6], (1,)]", "X: [\"['a', 1e-6]\", '(1,)']"),
    ("X = {'a': [1e-6]}", 'X: "{\'a\': [1e-6]}"'),
    ('X = [@f, @g.h(), %Y]', "X: ['@f', '@g.h()', '%Y']"),
    ('Plan.keep = 3', 'Plan.keep: 3'),
    ('Plan:\n  keep = [3]', 'Plan.keep: [3]'),
    (
      'X = 1\na/Y = 2\na/b/Z = [3]\na/c/Z = [4]\nd/Y = [5]',
      'X: 1\ngrids:\n- Y: 2\n  grids: [Z: [3], Z: [4]]\n- Y: [5]',
    ),
  ],
)
def test_values_of_gin(tmp_path, in_gin, in_yaml):
  runs = _read(tmp_path, in_gin, kind='gin')
  assert runs == _read(tmp_path, in_yaml)


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('X = [1', ':2: '),
    ('X 1', ":1: Couldn't parse statement"),
    ('X = 1\nX = 2', ':2: X is there twice'),
    ("include 'a.gin'", ':1: a sweep includes and imports nothing'),
    ("grids = ['a']", ':1: write a grid as a scope'),
    ("methd = 'dst'", "'methd' is none of .* did you mean 'method'"),
    ("a/methd = 'dst'", "'methd' is none of .* did you mean 'method'"),
    ('EPSILON = []', 'EPSILON has no values'),
    ("X = '{modl}'\nmodel = 'tiny'", "{modl} .* did you mean 'model'"),
    ('a/X = 1\nb/X = 2', 'two runs are called run; they differ in X'),
  ],
)
def test_mistakes_in_gin_have_one_line(tmp_path, text, message):
  with pytest.raises(UserError, match=message) as raised:
    _read(tmp_path, text, kind='gin')
  assert '\n' not in str(raised.value)


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
