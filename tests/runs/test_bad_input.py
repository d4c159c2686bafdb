"""A user's mistakes end in one error line, before any training."""

import json
import shutil

import commands
import numpy as np
import pytest
import tiny_t5

from dst_t5x.checkpoints import hf_checkpoint
from dst_t5x.checkpoints import run_folder
from dst_t5x.checkpoints import seeds
from dst_t5x.core.errors import UserError


def _message(arguments, binary='train'):
  """Returns the error line of a binary that runs in this process."""
  with pytest.raises(UserError) as caught:
    commands.call(binary, *arguments)
  message = str(caught.value)
  # Below the first line there is only what gin appends.
  first, *others = message.splitlines()
  assert all('In call to configurable' in o or not o.strip() for o in others)
  return first


@pytest.fixture(autouse=True)
def _tests_folder_on_path(monkeypatch):
  monkeypatch.syspath_prepend(commands.TESTS)


def _train(seed, folder, **bindings):
  return [
    *commands.dst(seed),
    *commands.flags(MODEL_DIR=folder, TRAIN_STEPS=20),
    *commands.flags(**bindings),
  ]


@pytest.mark.parametrize(
  ('bindings', 'parts'),
  [
    ({'EPSILOM': 0.1}, ['EPSILOM', "did you mean 'EPSILON'"]),
    ({'plan.Plan.trainsteps': 3}, ['trainsteps', "'train_steps'"]),
    ({'INPUT_FILE': 'x'}, ['INPUT_FILE']),
    ({'decoding.BeamSearch.alpha': 0.5}, ['alpha would have no effect']),
    ({'EPSILON': 0}, ['EPSILON must be in (0, 1]', 'it is 0']),
    ({'EPSILON': 1.5}, ['EPSILON', 'it is 1.5']),
    ({'EPSILON': -1}, ['EPSILON', 'it is -1']),
    ({'EPSILON': 'abc'}, ['EPSILON', "it is 'abc'"]),
    ({'MIXTURE_OR_TASK_NAME': 'toi'}, ["'toi'", "did you mean 'toy'"]),
    ({'EVAL_SPLIT': 'dev'}, ["no split 'dev'", "'validation'"]),
    ({'BATCH_SIZE': 0}, ['BATCH_SIZE must be a positive', 'it is 0']),
    ({'BATCH_SIZE': 'many'}, ['BATCH_SIZE', "it is 'many'"]),
    ({'EVAL_BATCH_SIZE': -1}, ['EVAL_BATCH_SIZE must be', 'it is -1']),
    ({'EVAL_EXAMPLES': 0}, ['EVAL_EXAMPLES must be', 'it is 0']),
    ({'MICROBATCHES': 3}, ['BATCH_SIZE = 16', 'MICROBATCHES = 3']),
    ({'MODEL_PARALLELISM': 3}, ['1 device', 'model_parallelism = 3']),
    ({'TRAIN_STEPS': 0}, ['TRAIN_STEPS must be a positive', 'it is 0']),
    ({'CHECKPOINT_PERIOD': 2.5}, ['CHECKPOINT_PERIOD', '2.5']),
    ({'LEARNING_RATE': -1.0}, ['LEARNING_RATE', '-1.0']),
    ({'LEARNING_RATE_DECAY': 'cosin'}, ["'cosin'", "'cosine'"]),
    ({'LOSS_NORMALIZING_FACTOR': 'MEAN'}, ["'MEAN'", "'NUM_TOTAL_TARGET_"]),
    (
      {'training.train.from_scratch': True},
      ['pretrained seed', 'finetune.gin'],
    ),
    ({'INITIAL_CHECKPOINT_PATH': '/no/seed'}, ['there is no /no/seed']),
    ({'MODEL_DIR': '/proc/nothing'}, ['MODEL_DIR', 'cannot be written to']),
  ],
)
def test_wrong_values(toy_seed, tmp_path, bindings, parts):
  folder = tmp_path / 'run'
  message = _message(_train(toy_seed, folder, **bindings))
  for part in parts:
    assert part in message
  assert not (folder / 'metrics.jsonl').exists()
  assert not list(folder.glob('checkpoints/*'))


def test_missing_values(tmp_path):
  message = _message([commands.TOY, '--gin_file=gin/runs/finetune.gin'])
  assert message.startswith('values are missing: set')
  for name in 'MODEL_DIR', 'INITIAL_CHECKPOINT_PATH', 'PROJECTION':
    assert name in message


def test_model_dir_that_is_a_file(toy_seed, tmp_path):
  file = tmp_path / 'file'
  file.write_text('mine')
  message = _message(_train(toy_seed, file))
  assert f'MODEL_DIR {file} cannot be written to' in message
  assert file.read_text() == 'mine'
  message = _message(_train(toy_seed, file / 'below'))
  assert 'cannot be written to' in message


def test_model_dir_that_is_a_link_to_nothing(toy_seed, tmp_path):
  link = tmp_path / 'link'
  link.symlink_to(tmp_path / 'gone')
  for folder in (link, link / 'below'):
    message = _message(_train(toy_seed, folder))
    assert message == (
      f'MODEL_DIR {folder} cannot be written to: {link} is a link to '
      f'{tmp_path}/gone, which is not there'
    )
  assert link.is_symlink()
  assert not (tmp_path / 'gone').exists()


@pytest.mark.parametrize(
  ('part', 'remedy'),
  [
    ('checkpoints/40', '; eval and infer take CHECKPOINT_STEP=40'),
    ('checkpoints/40/parameters', ''),
    ('checkpoints', ''),
  ],
)
def test_a_part_of_a_run_as_checkpoint(toy_run, part, remedy):
  with pytest.raises(UserError) as caught:
    seeds.load_seed(toy_run / part)
  assert str(caught.value) == (
    f'{toy_run / part} is a part of the run in {toy_run}: name that folder'
    f'{remedy}'
  )


def test_an_empty_checkpoint_after_a_whole_one(toy_run, tmp_path):
  folder = tmp_path / 'run'
  shutil.copytree(toy_run, folder)
  empty = folder / 'checkpoints' / '90'
  empty.mkdir()
  with pytest.raises(UserError) as caught:
    seeds.load_run(folder)
  message = str(caught.value)
  assert message.startswith(f'cannot read checkpoint 90 of {folder}: ')
  assert message.endswith(
    f'; checkpoint 40 is whole: it counts once {empty} is removed'
  )
  empty.rmdir()
  assert seeds.load_run(folder).step == 40


def test_checkpoints_of_other_models(toy_seed, tmp_path):
  hf_checkpoint.save(tmp_path / 'hf', tiny_t5.random_params(), tiny_t5.NETWORK)
  message = _message(_train(tmp_path / 'hf', tmp_path / 'run'))
  assert 'another size' in message
  assert 'emb_dim is 8 in the checkpoint, 32 in the model' in message
  message = _message(
    _train(toy_seed, tmp_path / 'run', **{'network.T5Config.vocab_size': 300})
  )
  assert 'another vocabulary' in message
  assert '264' in message
  assert '300' in message


def test_checkpoints_that_are_none(toy_seed, tmp_path):
  (tmp_path / 'empty').mkdir()
  message = _message(_train(tmp_path / 'empty', tmp_path / 'run'))
  assert 'nothing to load' in message
  misspelt = toy_seed.with_name('sead')
  assert "did you mean 'seed'" in _message(_train(misspelt, tmp_path / 'run'))


def test_a_folder_of_another_run(toy_seed, toy_run, tmp_path):
  folder = tmp_path / 'run'
  folder.mkdir()
  shutil.copy(toy_run / 'run.json', folder)
  before = (folder / 'run.json').read_bytes()
  message = _message(_train(toy_seed, folder, EPSILON=0.02))
  assert 'method.epsilon = 0.01, not 0.02' in message
  assert 'choose another MODEL_DIR' in message
  other = tmp_path / 'other'
  seed = seeds.load_seed(toy_seed)
  changed = dict(seed.params)
  changed['token_embedder'] = {
    'embedding': seed.params['token_embedder']['embedding'] + np.float32(1)
  }
  from test_binaries import CONFIG

  from dst_t5x.models.t5 import network

  hf_checkpoint.save(other, changed, network.Transformer(CONFIG))
  message = _message(_train(other, folder))
  assert f'started from another seed, {toy_seed}' in message
  assert (folder / 'run.json').read_bytes() == before


def test_a_seed_that_vanished(toy_seed, toy_run, tmp_path):
  folder = tmp_path / 'run'
  shutil.copytree(toy_run, folder)
  gone = tmp_path / 'gone'
  message = _message(_train(gone, folder))
  assert message.startswith(f'there is no {gone}')
  # Evaluating reads where the seed is from the run.
  for file in folder.glob('checkpoints/*/about/metadata'):
    about = json.loads(file.read_text())
    about['seed']['path'] = str(gone)
    file.write_text(json.dumps(about))
  message = _message(
    [
      commands.TOY,
      '--gin_file=gin/runs/eval.gin',
      *commands.flags(CHECKPOINT_PATH=folder, EVAL_OUTPUT_DIR=tmp_path / 'e'),
    ],
    'eval',
  )
  assert f'the seed of the run in {folder} cannot be loaded' in message
  assert f'there is no {gone}' in message


@pytest.mark.parametrize('content', ['{"config":', '[]', '{"seed": null}', ''])
def test_a_damaged_run_file(toy_seed, tmp_path, content):
  (tmp_path / 'run.json').write_text(content)
  message = _message(_train(toy_seed, tmp_path))
  assert f'{tmp_path / "run.json"} is damaged' in message


# Orbax leaves coroutines behind that never ran.
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
@pytest.mark.parametrize('damage', ['gone', 'cut', 'empty'])
def test_a_damaged_checkpoint(toy_seed, toy_run, tmp_path, damage):
  """Any damaged file gives one error line, or does not matter."""
  files = sorted(
    file.relative_to(toy_run)
    for file in (toy_run / 'checkpoints' / '40').rglob('*')
    if file.is_file()
  )
  folder = tmp_path / 'run'
  shutil.copytree(toy_run, folder)
  whole = run_folder.RunFolder(folder, read_only=True)
  wanted = whole.parameters(40), whole.position(40), whole.about(40)
  messages = []
  for file in files:
    content = (folder / file).read_bytes()
    if damage == 'gone':
      (folder / file).unlink()
    else:
      (folder / file).write_bytes(
        content[: len(content) // 2] if damage == 'cut' else b''
      )
    reader = None
    try:
      reader = run_folder.RunFolder(folder, read_only=True)
      found = reader.parameters(40), reader.position(40), reader.about(40)
      np.testing.assert_equal(found, wanted)
    except UserError as e:
      messages.append(str(e))
    finally:
      if reader is not None:
        reader.close()
    (folder / file).write_bytes(content)
  assert messages
  for message in messages:
    assert message.startswith(f'cannot read checkpoint 40 of {folder}: ')
    assert len(message.splitlines()) == 1


def test_wrong_steps_and_files_of_the_other_binaries(toy_run, tmp_path):
  def message(binary, **bindings):
    return _message(
      [
        commands.TOY,
        f'--gin_file=gin/runs/{binary}.gin',
        *commands.flags(CHECKPOINT_PATH=toy_run, **bindings),
      ],
      binary,
    )

  assert 'has no checkpoint 7, only [30, 40]' in message(
    'eval', EVAL_OUTPUT_DIR=tmp_path, CHECKPOINT_STEP=7
  )
  assert 'EVAL_OUTPUT_DIR' in message('eval', EVAL_OUTPUT_DIR='/proc/nothing')
  assert 'cannot read INPUT_FILE' in message(
    'infer', INFER_OUTPUT_DIR=tmp_path, INPUT_FILE=str(tmp_path / 'none')
  )
  assert 'INFER_OUTPUT_DIR' in message(
    'infer', INFER_OUTPUT_DIR='/proc/nothing'
  )


@pytest.mark.parametrize('missing', ['data', 'vocabulary'])
def test_what_a_task_needs_is_missing(shared_data, tmp_path, missing):
  vocabulary = next((shared_data / 'vocab').glob('*.model'))
  if missing == 'vocabulary':
    vocabulary = tmp_path / 'none.model'
  status, _, err = commands.finish(
    commands.start(
      'train',
      '--gin_file=gin/models/t5_1_1_tiny.gin',
      '--gin_file=gin/tasks/gsm8k.gin',
      '--gin_file=gin/methods/dst.gin',
      '--gin_file=gin/runs/finetune.gin',
      *commands.flags(
        MODEL_DIR=tmp_path / 'run', INITIAL_CHECKPOINT_PATH=tmp_path
      ),
      environment={
        'DST_VOCABULARY': str(vocabulary),
        'TFDS_DATA_DIR': str(tmp_path / 'empty'),
      },
    )
  )
  assert status == 1
  *_, line = err.splitlines()
  assert line.startswith('error: ')
  wanted = {
    'data': ['gsm8k', str(tmp_path / 'empty'), 'TFDS_DATA_DIR'],
    'vocabulary': [str(vocabulary), 'DST_VOCABULARY'],
  }
  for part in wanted[missing]:
    assert part in line
  assert 'Traceback' not in err


# No file may grow beyond 1,600 blocks of 512 bytes.
_NO_SPACE = ['sh', '-c', 'ulimit -f 1600; exec "$@"', 'sh']


def test_a_full_disk(tmp_path):
  folder = tmp_path / 'run'
  arguments = [
    *commands.PRETRAIN,
    '--gin.network.T5Config.mlp_dim=4096',  # Makes parameters of 5 MB.
    *commands.flags(MODEL_DIR=folder, EVAL_EXAMPLES=4),
  ]
  commands.call('train', *arguments, '--gin.TRAIN_STEPS=5')
  before = commands.fingerprint(folder)
  arguments.append('--gin.TRAIN_STEPS=10')
  status, _, err = commands.finish(
    commands.start('train', *arguments, prefix=_NO_SPACE)
  )
  assert status == 1, err
  assert 'Traceback' not in err
  *_, line = err.splitlines()
  assert line.startswith(f'error: cannot write a checkpoint to {folder}')
  assert line.endswith('checkpoint 5 is whole')
  assert commands.fingerprint(folder) == before
  commands.call('train', *arguments)
  assert commands.fingerprint(folder)[0] == 10


@pytest.mark.parametrize(
  ('rate', 'message'),
  [
    (1e10, 'the loss is nan at step 4, and 3 in a row were refused'),
    # A finite loss may come with an update that is not.
    (1e30, 'an update is not finite at step 4, and 3 in a row were refused'),
  ],
)
def test_what_is_not_finite_is_not_saved(toy_seed, tmp_path, rate, message):
  folder = tmp_path / 'run'
  found = _message(
    [
      *commands.finetune(toy_seed, 'full'),
      *commands.flags(
        MODEL_DIR=folder,
        TRAIN_STEPS=5,
        CHECKPOINT_PERIOD=1,
        KEEP=9,
        LEARNING_RATE=rate,
      ),
    ]
  )
  assert message in found
  assert 'lower the learning rate' in found
  reader = run_folder.RunFolder(folder, read_only=True)
  steps = reader.steps
  reader.close()
  assert steps == [1]
  params = seeds.load_run(folder, 1).params
  assert all(np.isfinite(x).all() for x in tiny_t5.flat(params).values())
