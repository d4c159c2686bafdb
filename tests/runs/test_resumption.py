"""What a run can resume from, and that a failed evaluation loses no step."""

import json
import shutil

import commands
import jax
import optax
import pytest

from dst_t5x import subsets
from dst_t5x.checkpoints import seeds
from dst_t5x.checkpoints import t5x_checkpoint
from dst_t5x.core.errors import UserError
from dst_t5x.runs import identity


def _train(seed, folder, *arguments, **bindings):
  commands.call(
    'train',
    *commands.dst(seed),
    *commands.flags(MODEL_DIR=folder, EVAL_EXAMPLES=4, **bindings),
    *arguments,
  )


def _evaluations(folder):
  rows = map(json.loads, (folder / 'metrics.jsonl').read_text().splitlines())
  return [row for row in rows if 'eval/loss' in row]


def _read(folder, name):
  return json.loads((folder / name).read_text())


def _step_of(file):
  return subsets.load(file)[1]['step']


def test_an_evaluation_that_fails_loses_no_step(toy_seed, tmp_path):
  import toy_task

  plan = {
    'MIXTURE_OR_TASK_NAME': 'toy_fragile',
    'KEEP_BEST_BY': 'toy_fragile/exact_match',
    'EVAL_PERIOD': 4,
    'CHECKPOINT_PERIOD': 4,
    'TRAIN_STEPS': 8,
  }
  whole, folder = tmp_path / 'whole', tmp_path / 'run'
  _train(toy_seed, whole, **plan)
  for step in (4, 8):  # Each time it gets to the next evaluation.
    toy_task.BREAKS['now'] = True
    try:
      with pytest.raises(ValueError, match='a wrong prediction'):
        _train(toy_seed, folder, **plan | {'TRAIN_STEPS': step})
    finally:
      toy_task.BREAKS['now'] = False
    assert max(commands.checkpoint(folder).steps) == step
    assert [row['step'] for row in _evaluations(folder)] == [4][: step // 8]
    # The evaluation is made up for, and then nothing is left to train.
    _train(toy_seed, folder, **plan | {'TRAIN_STEPS': step})
  assert _evaluations(folder) == _evaluations(whole)
  assert _read(folder, 'best.json') == _read(whole, 'best.json')
  ours, theirs = (_read(f, 'report.json')['results'] for f in (folder, whole))
  assert ours == theirs
  for name in ('last.dst', 'best.dst'):
    assert (folder / name).read_bytes() == (whole / name).read_bytes()


def test_a_refused_step_is_never_the_best(toy_seed, tmp_path):
  folder = tmp_path / 'run'
  _train(
    toy_seed,
    folder,
    '--gin.optimizers.adafactor.learning_rate=@toy_task.spiked()',
    TRAIN_STEPS=12,
    EVAL_PERIOD=5,
    KEEP_BEST_BY='eval/loss',
  )
  at = {row['step']: row['eval/loss'] for row in _evaluations(folder)}
  assert at[10] < at[5] < at[12]  # The tenth step was refused, and not saved.
  assert commands.checkpoint(folder).steps == [5, 12]
  found = _read(folder, 'best.json')
  assert (found['step'], found['value']) == (5, at[5])
  assert _step_of(folder / 'best.dst') == 5
  assert _step_of(folder / 'last.dst') == 12


def test_another_metric_goes_by_the_checkpoints_there_are(toy_seed, tmp_path):
  """An evaluated checkpoint that was not kept cannot become the best."""
  folder = tmp_path / 'run'
  plan = {'EVAL_PERIOD': 3, 'LEARNING_RATE': 2.0, 'CHECKPOINT_PERIOD': 6}
  _train(toy_seed, folder, TRAIN_STEPS=6, **plan)
  assert not (folder / 'best.json').exists()
  _train(toy_seed, folder, TRAIN_STEPS=8, KEEP_BEST_BY='eval/loss', **plan)
  at = {row['step']: row['eval/loss'] for row in _evaluations(folder)}
  assert sorted(at) == [3, 6, 8]
  kept = commands.checkpoint(folder).steps
  best = _read(folder, 'best.json')['step']
  assert best == min({6, 8}, key=at.get)
  assert best in kept
  assert _step_of(folder / 'best.dst') == best
  # And without it again, as long as the checkpoint is there.
  _train(toy_seed, folder, TRAIN_STEPS=10, **plan)
  assert not (folder / 'best.json').exists()
  assert commands.checkpoint(folder).steps == [10]
  assert _step_of(folder / 'best.dst') == 10


@pytest.fixture(scope='module')
def short_run(toy_seed, tmp_path_factory):
  """A run of four steps; read-only."""
  folder = tmp_path_factory.mktemp('short') / 'run'
  _train(toy_seed, folder, TRAIN_STEPS=4)
  return folder


def _without_record(folder):
  """Removes the run's record from a checkpoint."""
  (file,) = folder.glob('checkpoints/*/about/metadata')
  about = json.loads(file.read_text())
  del about['run']
  file.write_text(json.dumps(about))


@pytest.mark.parametrize('run_file', ['lost', "another's", 'here'])
@pytest.mark.parametrize(
  ('other', 'message'),
  [
    ({'EPSILON': 0.02}, r'has .*epsilon = 0.01, not 0.02'),
    ({'RANDOM_SEED': 7}, r'has .*random_seed = 0, not 7'),
    ({}, ''),
  ],
)
def test_a_checkpoint_is_continued_by_its_own_run(
  toy_seed, short_run, tmp_path, run_file, other, message
):
  folder = tmp_path / 'run'
  shutil.copytree(short_run, folder)
  if run_file == 'lost':
    (folder / 'run.json').unlink()
  elif run_file == "another's":
    record = _read(folder, 'run.json')
    for name, value in other.items():
      group = record['method'] if name == 'EPSILON' else record
      group[name.lower()] = value
    (folder / 'run.json').write_text(json.dumps(record))
  if message:
    with pytest.raises(UserError, match=message):
      _train(toy_seed, folder, TRAIN_STEPS=5, **other)
    assert commands.checkpoint(folder).steps == [4]
  else:
    _train(toy_seed, folder, TRAIN_STEPS=4)
    assert _read(folder, 'run.json') == _read(short_run, 'run.json')


def test_a_checkpoint_of_another_seed(toy_seed, short_run, tmp_path):
  folder, other = tmp_path / 'run', tmp_path / 'other'
  shutil.copytree(short_run, folder)
  (folder / 'run.json').unlink()
  params = seeds.load_seed(short_run).params
  t5x_checkpoint.save(other, params, 1)
  for only_check in (True, False):
    with pytest.raises(UserError, match='started from another seed'):
      _train(
        other,
        folder,
        f'--gin.training.train.only_check={only_check}',
        TRAIN_STEPS=5,
      )
  assert not (folder / 'run.json').exists()


def test_checkpoints_that_nothing_is_known_of(toy_seed, short_run, tmp_path):
  folder = tmp_path / 'run'
  shutil.copytree(short_run, folder)
  _without_record(folder)
  # `run.json` alone is believed.
  assert len(identity.records(folder)) == 1
  (folder / 'run.json').unlink()
  with pytest.raises(UserError, match=r'has checkpoints, but no run\.json'):
    _train(toy_seed, folder, TRAIN_STEPS=5)


def test_another_optax_goes_on(toy_seed, tmp_path, monkeypatch):
  """The other Optax wraps the optimizer in one more transformation."""
  whole, folder = tmp_path / 'whole', tmp_path / 'run'
  _train(toy_seed, whole, TRAIN_STEPS=4)
  _train(toy_seed, folder, TRAIN_STEPS=2)
  ours = optax.adafactor

  def theirs(*arguments, **settings):
    return optax.chain(optax.identity(), ours(*arguments, **settings))

  monkeypatch.setattr(optax, 'adafactor', theirs)
  jax.clear_caches()
  try:
    _train(toy_seed, folder, TRAIN_STEPS=4)
  finally:
    monkeypatch.undo()
    jax.clear_caches()
  assert commands.fingerprint(whole) == commands.fingerprint(folder)


def _jsonl(tmp_path, seed, train, steps):
  """Trains on a file of rows."""
  lines = [json.dumps({'inputs': a, 'targets': b}) + '\n' for a, b in train]
  file = tmp_path / 'train.jsonl'
  file.write_text(''.join(lines))
  _train(
    seed,
    tmp_path / 'run',
    '--gin_file=gin/tasks/jsonl.gin',
    VOCABULARY='bytes',
    TRAIN_FILE=file,
    EVAL_FILE=file,
    TASK_FEATURE_LENGTHS={'inputs': 16, 'targets': 16},
    TRAIN_STEPS=steps,
  )


def test_rows_that_were_edited_are_not_gone_on_with(toy_seed, tmp_path):
  rows = [(f'copy: {i}', str(i)) for i in range(20)]
  _jsonl(tmp_path, toy_seed, rows, 2)
  record = _read(tmp_path / 'run', 'run.json')['rows']['jsonl']
  assert (record['file'], record['rows']) == ('TRAIN_FILE', 20)
  for edited in (
    [*rows, ('copy: 20', '20')],
    rows[1:],
    [('copy: 1', '1'), *rows[1:]],
    rows[::-1],
  ):
    with pytest.raises(UserError, match=r'trained on other rows .* TRAIN_FILE'):
      _jsonl(tmp_path, toy_seed, edited, 4)
  _jsonl(tmp_path, toy_seed, rows, 4)  # A later time of the same rows is none.
  assert _read(tmp_path / 'run', 'report.json')['step'] == 4
