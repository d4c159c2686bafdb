"""The checks of preflight; test_processes.py has those of several hosts."""

import commands
import jax
import networks
import pytest

from dst_t5x.core.errors import UserError
from dst_t5x.engine import optimizers
from dst_t5x.engine import parameters
from dst_t5x.engine import partitioning
from dst_t5x.engine import trainer as trainer_lib
from dst_t5x.method import projection
from dst_t5x.runs import plan as plan_lib
from dst_t5x.runs import preflight


def _check(seed, folder, *arguments):
  commands.call(
    'train',
    *commands.dst(seed),
    *commands.flags(MODEL_DIR=folder),
    '--gin.training.train.only_check=True',
    *arguments,
  )


def test_what_is_well_is_told_and_no_trace_left(toy_seed, tmp_path, capsys):
  _check(toy_seed, tmp_path / 'not' / 'there')
  lines = capsys.readouterr().out.splitlines()
  told = {line.split()[0]: line for line in lines}
  assert list(told) == [
    'devices', 'versions', 'mesh', 'data', 'batch', 'evaluation', 'MODEL_DIR',
    'configuration', 'disk', 'seed',
  ]  # fmt: skip
  assert '1 of kind cpu' in told['devices']
  assert f'jax {jax.__version__}' in told['versions']
  assert 'data 1 × fsdp 1 × model 1' in told['mesh']
  assert 'toy, 259 pieces' in told['data']
  assert '16 rows' in told['batch']
  assert commands.fingerprint(toy_seed)[1][:12] in told['seed']
  assert not list(tmp_path.iterdir())


def test_what_is_wrong_comes_before_what_takes_long(toy_seed, tmp_path, capsys):
  with pytest.raises(UserError, match='BATCH_SIZE = 16 is not a multiple of'):
    _check(toy_seed, tmp_path / 'run', '--gin.MICROBATCHES=3')
  assert 'seed' not in capsys.readouterr().out
  with pytest.raises(UserError, match=r"nothing called 'sed' .* mean 'seed'"):
    _check(toy_seed.with_name('sed'), tmp_path / 'run')
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (
      {'KEEP_BEST_BY': 'toy/exact_mach'},
      r"KEEP_BEST_BY: no metric 'toy/exact_mach'; did you mean 'toy/exact_m",
    ),
    ({'DECODER': 'greedy'}, r"DECODER must be a function .* it is 'greedy'"),
    ({'DECODER': '@decoding.GreedyDecoder'}, r'DECODER must be .*Decoder\(\)'),
    # What only trying it tells: a function of other arguments.
    ({'DECODER': '@toy_task.exact_match'}, r'DECODER .* cannot decode: '),
    ({'BEAMS': 0}, r'BeamSearch.num_beams must be .* it is 0'),
    ({'BEAMS': -4}, r'BeamSearch.num_beams must be .* it is -4'),
    ({'EVAL_SPLIT': None}, r'EVAL_SPLIT .* None'),
    (
      {'MIXTURE_OR_TASK_NAME': 'toy_unscored'},
      r"split of task 'toy_unscored' cannot be scored: .*no such scores",
    ),
    (
      {'INITIAL_CHECKPOINT_PATH': ''},
      r'INITIAL_CHECKPOINT_PATH must be a path',
    ),
    (
      {'training.train.from_scratch': True},
      r'this method tunes a pretrained seed',
    ),
  ],
)
@pytest.mark.parametrize('binary', ['preflight', 'train'])
def test_neither_says_yes_where_the_other_says_no(
  toy_seed, tmp_path, binary, flags, message
):
  flags = dict(flags)
  decoder = flags.get('DECODER', '')
  texts = []
  if 'BEAMS' in flags:
    beams = flags.pop('BEAMS')
    texts = [
      '--gin.DECODER=@decoding.BeamSearch()',
      f'--gin.decoding.BeamSearch.num_beams={beams}',
    ]
  elif decoder.startswith('@'):
    texts = [f'--gin.DECODER={flags.pop("DECODER")}']
  with pytest.raises(UserError, match=message):
    commands.call(
      'train',
      *commands.dst(toy_seed),
      *commands.flags(MODEL_DIR=tmp_path / 'run', **flags),
      f'--gin.training.train.only_check={binary == "preflight"}',
      *texts,
    )
  # Neither has begun anything.
  assert not (tmp_path / 'run').exists()


def test_a_folder_of_another_run(toy_seed, toy_run):
  before = sorted(p.name for p in toy_run.iterdir())
  with pytest.raises(UserError, match=r'has .*epsilon = 0.01, not 0.02'):
    _check(toy_seed, toy_run, '--gin.EPSILON=0.02')
  assert sorted(p.name for p in toy_run.iterdir()) == before


def test_a_disk_that_is_too_small(tmp_path):
  found = preflight.disk_space(tmp_path / 'run', 1000, '2 checkpoints')
  assert 'GiB left; 2 checkpoints take 0.000 GiB' in found.text
  with pytest.raises(UserError, match=r'left on its disk, and 2 checkpoints'):
    preflight.disk_space(tmp_path / 'run', 2**60, '2 checkpoints')


def test_what_is_written_grows_with_what_is_kept():
  network = networks.tiny()
  space = parameters.ParameterSpace(network, partitioning.Partitioner())
  optimizer = optimizers.adafactor(optimizers.schedule(0.1))

  def written(method, **settings):
    trainer = trainer_lib.Trainer(network, optimizer, method)
    plan = plan_lib.Plan(train_steps=100, checkpoint_period=10, **settings)
    return preflight.written(trainer, space, plan)

  full, _ = written(projection.NoProjection())
  dst = projection.SubsetProjection(epsilon=0.1)
  kept, what = written(dst)
  assert what == '2 checkpoints and 10 subsets'
  without, what = written(dst, keep_subsets=False)
  assert what == '2 checkpoints'
  more, _ = written(dst, keep_subsets=False, keep=3)
  assert more == 2 * without
  assert without < kept
  assert without < full


def test_a_folder_that_is_another_one_elsewhere(tmp_path):
  with preflight.no_trace(tmp_path / 'run') as token:
    preflight.model_dir_writable(tmp_path / 'run', token)
    assert preflight.model_dir_shared(tmp_path / 'run', token).text
    [file] = (tmp_path / 'run').iterdir()
    file.unlink()
    with pytest.raises(UserError, match='is not the same folder as in process'):
      preflight.model_dir_shared(tmp_path / 'run', token)
  assert not (tmp_path / 'run').exists()


def test_the_first_difference_is_named_with_its_process():
  def found(error='', **same):
    return {'error': error, 'same': same}

  preflight._compare([found(a=1, b=2)] * 3)
  with pytest.raises(
    UserError, match='b is 3 in process 2, and 2 in process 0'
  ):
    preflight._compare([found(a=1, b=2), found(a=1, b=2), found(a=1, b=3)])
  with pytest.raises(UserError, match='a is None in process 1'):
    preflight._compare([found(a=1), found()])
  # An error goes before a difference, which may be its consequence.
  with pytest.raises(UserError, match=r'^no seed, in process 1'):
    preflight._compare([found(a=1), found('no seed')])
  with pytest.raises(UserError, match=r'^no seed$'):
    preflight._compare([found('no seed')] * 2)
