"""Every macro of the package says what it may be, in sweeps, too."""

import functools

import commands
import pytest

from dst_t5x.config import binaries
from dst_t5x.config import gin_files
from dst_t5x.core.errors import UserError
from dst_t5x.launch import grid
from dst_t5x.launch import states
from dst_t5x.launch import worker

_MODEL = 'gin/models/t5_1_1_tiny.gin'
_OWN = 'gin/tasks/jsonl.gin'
_TUNE = ['gin/runs/finetune.gin']
_NEEDED = {
  'gin/runs/finetune.gin': ['MODEL_DIR=m', 'INITIAL_CHECKPOINT_PATH=s'],
  'gin/runs/pretrain.gin': ['MODEL_DIR=m'],
  'gin/runs/eval.gin': ['CHECKPOINT_PATH=c', 'EVAL_OUTPUT_DIR=o'],
  'gin/runs/infer.gin': ['CHECKPOINT_PATH=c', 'INFER_OUTPUT_DIR=o'],
}
_CONFIGURATIONS = {
  'dst': ('train', [_MODEL, _OWN, 'gin/methods/random.gin', *_TUNE]),
  'lora': ('train', [_MODEL, _OWN, 'gin/methods/lora.gin', *_TUNE]),
  'prompt': ('train', [_MODEL, _OWN, 'gin/methods/prompt.gin', *_TUNE]),
  'pretraining': ('train', [_MODEL, _OWN, 'gin/runs/pretrain.gin']),
  'eval': ('eval', [_MODEL, 'gin/tasks/wmt.gin', 'gin/runs/eval.gin']),
  'infer': ('infer', [_MODEL, _OWN, 'gin/runs/infer.gin']),
  'show_task': ('show_task', [_OWN, 'gin/runs/show_task.gin']),
  'prepare_data': ('prepare_data', [_OWN, 'gin/runs/prepare_data.gin']),
  'estimate': (
    'estimate',
    [
      *('gin/runs/train.gin', _MODEL, _OWN, 'gin/methods/dst.gin'),
      'gin/runs/estimate.gin',
    ],
  ),
}


def _arguments(files):
  needed = [f'--gin.{flag}' for name in files for flag in _NEEDED.get(name, [])]
  return [*(f'--gin_file={name}' for name in files), *needed]


@functools.cache
def _macros(name):
  """The macros of a gin file and of those that it includes."""
  lines = gin_files.find(name).read_text().splitlines()
  included = [line.split("'")[1] for line in lines if line[:8] == 'include ']
  own = [line.split(' = ')[0] for line in gin_files.macro_lines(name)]
  return {*own, *(macro for other in included for macro in _macros(other))}


def _refusal(binary, arguments):
  with pytest.raises(UserError) as caught:
    binaries.parse(arguments, commands.binary(binary))
  message = str(caught.value)
  assert '\n' not in message
  return message


@pytest.mark.parametrize('name', _CONFIGURATIONS)
def test_no_macro_may_be_anything(name):
  binary, files = _CONFIGURATIONS[name]
  arguments = _arguments(files)
  binaries.parse(arguments, commands.binary(binary))  # As they are, all fit.
  refused = 0
  for macro in sorted(set().union(*map(_macros, files))):
    flag = f'--gin.{macro}=[{{"x": [None]}}]'
    message = _refusal(binary, [*arguments, flag])
    if 'is not used by this configuration' in message:
      continue
    assert message.startswith(f'{macro} must be ')
    assert message.endswith("; it is [{'x': [None]}]")
    refused += 1
  assert refused


@pytest.mark.parametrize(
  ('flag', 'line'),
  [
    ('CHURN=no', "CHURN must be True or False; it is 'no': write False"),
    ("CHURN='False'", 'CHURN must be True or False; it is '),
    ('PACK=0', 'PACK must be True or False; it is 0'),
    ('MODEL_DIR=2024', "MODEL_DIR must be a path; it is 2024: write '2024'"),
    ('MODEL_DIR=None', 'MODEL_DIR must be a path; it is None'),
    ("MODEL_DIR=''", "MODEL_DIR must be a path; it is ''"),
    ("INITIAL_CHECKPOINT_PATH=''", 'INITIAL_CHECKPOINT_PATH must be a path'),
    ('TRAIN_FILE=7', 'TRAIN_FILE must be a path or None; it is 7'),
    ('RANDOM_SEED=None', 'RANDOM_SEED must be a whole number in [0, '),
    ('RANDOM_SEED=1.5', 'RANDOM_SEED must be a whole number in [0, '),
    ('RANDOM_SEED=-1', 'RANDOM_SEED must be a whole number in [0, '),
    ('TRAIN_STEPS=1e3', 'TRAIN_STEPS must be a positive whole number; it is 1'),
    ('BATCH_SIZE=True', 'BATCH_SIZE must be a positive whole number; it is T'),
    ('LABEL_SMOOTHING="0.1"', "LABEL_SMOOTHING must be in [0, 1); it is '0.1'"),
    ('DROPOUT_RATE=-0.1', 'DROPOUT_RATE must be in [0, 1); it is -0.1'),
    ('LEARNING_RATE=1e999', 'LEARNING_RATE must be at least 0 and finite; it'),
    ('EPSILON=2', 'EPSILON must be in (0, 1]; it is 2'),
    ('METRICS=bleu', "METRICS must be a list (each item text); it is 'bleu'"),
    ('EVAL_SPLIT=None', 'EVAL_SPLIT must be text; it is None'),
    ('DECODER=greedy', "DECODER must be a function (@module.name); it is 'gr"),
    (
      'DECODER=@decoding.BeamSearch',
      'DECODER must be a function (@module.name); it is '
      '@dst_t5x.models.decoding.BeamSearch: write '
      '@dst_t5x.models.decoding.BeamSearch()',
    ),
    (
      'PROJECTION=@decoding.GreedyDecoder()',
      'PROJECTION must be a Projection (@module.name()); it is @dst_t5x',
    ),
    ("DISTANCE='relativ'", 'DISTANCE must be one of '),
    ('ACTIVATION_DTYPE=float16', 'ACTIVATION_DTYPE must be one of '),
    (
      "TASK_FEATURE_LENGTHS={'inputs': None, 'targets': 3}",
      'TASK_FEATURE_LENGTHS must be a dictionary (each value a positive whole',
    ),
  ],
)
def test_values_of_the_wrong_kind(flag, line):
  arguments = _arguments(_CONFIGURATIONS['dst'][1])
  message = _refusal('train', [*arguments, f'--gin.{flag}'])
  assert message.startswith(line)


def test_a_parameter_may_be_set_before_what_it_belongs_to_is_chosen():
  arguments = _arguments(_CONFIGURATIONS['infer'][1])
  flags = [
    '--gin.BeamSearch.num_beams=2',
    '--gin.DECODER=@decoding.BeamSearch()',
  ]
  for ordered in (flags, flags[::-1]):
    binaries.parse([*arguments, *ordered], commands.binary('infer'))
    found = binaries.bindings(commands.binary('infer'))
    assert found['dst_t5x.models.decoding.BeamSearch.num_beams'] == '2'


@pytest.mark.parametrize(
  ('line', 'message'),
  [
    ('CHURN: [yes, no]', "CHURN must be True or False; it is 'yes': write T"),
    ('CHURN: ["\'False\'"]', 'CHURN must be True or False; it is '),
    ('EPSILON: [2]', 'EPSILON must be in (0, 1]; it is 2'),
    ('DROPOUT_RATE: [-0.1]', 'DROPOUT_RATE must be in [0, 1); it is -0.1'),
    ('DISTANCE: [absolut]', 'DISTANCE must be one of '),
    ('METRICS: bleu', 'METRICS must be a list (each item text); it is '),
    ('CHURN: [True, False]', ''),
  ],
)
def test_sweeps_are_checked_before_their_first_run(tmp_path, line, message):
  file = tmp_path / 'sweep.yaml'
  file.write_text(
    f'model: tiny\ntask: jsonl\nmethod: dst\nINITIAL_CHECKPOINT_PATH: s\n{line}'
  )
  first, *_ = grid.read(str(file))
  folder = tmp_path / first.name
  answer = worker.check_run(first.flags(folder), str(folder))
  assert answer['error'].startswith(message)
  assert bool(answer['error']) == bool(message)


def test_home_in_the_folder_of_a_sweep(monkeypatch, tmp_path):
  monkeypatch.setenv('HOME', str(tmp_path))
  sweep = states.Sweep([], '~/x')
  assert sweep.here == tmp_path / 'x'
  assert sweep.folder('a') == tmp_path / 'x' / 'a'
