"""The binaries in combination: seeds, evaluation, decoding, meshes."""

import functools
import json
import re

import commands
import jax
import numpy as np
import pytest

from dst_t5x import subsets as subset
from dst_t5x.checkpoints import hf_checkpoint
from dst_t5x.checkpoints import seeds
from dst_t5x.checkpoints import t5x_checkpoint
from dst_t5x.core.errors import UserError
from dst_t5x.models.t5 import network
from dst_t5x.subsets import fingerprint

CONFIG = network.T5Config(
  vocab_size=264,
  emb_dim=32,
  num_heads=2,
  num_encoder_layers=2,
  num_decoder_layers=1,
  head_dim=8,
  mlp_dim=48,
  mlp_activations=('gelu', 'linear'),
)


def _finetune(seed, folder, *arguments, steps=20, how=commands.call):
  how(
    'train',
    *commands.dst(seed),
    *commands.flags(MODEL_DIR=folder, TRAIN_STEPS=steps),
    *arguments,
  )
  return subset.load(folder / 'last.dst')[0]


def _metrics(folder, step):
  lines = (folder / 'metrics.jsonl').read_text().splitlines()
  rows = [row for row in map(json.loads, lines) if row['step'] == step]
  return {name: value for row in rows for name, value in row.items()}


def _evaluate(checkpoint, folder, *arguments):
  commands.call(
    'eval',
    commands.TOY,
    '--gin_file=gin/runs/eval.gin',
    *commands.flags(CHECKPOINT_PATH=checkpoint, EVAL_OUTPUT_DIR=folder),
    *arguments,
  )
  return json.loads((folder / 'results.json').read_text())


def _infer(checkpoint, folder, *arguments):
  commands.call(
    'infer',
    commands.TOY,
    '--gin_file=gin/runs/infer.gin',
    *commands.flags(CHECKPOINT_PATH=checkpoint, INFER_OUTPUT_DIR=folder),
    *arguments,
  )
  with (folder / 'predictions.jsonl').open() as lines:
    return [json.loads(line) for line in lines]


def _overlap(one, other):
  """Returns the share of a subset's components that another one has too."""
  common = sum(
    len(np.intersect1d(positions, other.positions.get(name, [])))
    for name, positions in one.positions.items()
  )
  return common / one.size


def test_what_a_run_leaves(toy_run, toy_seed):
  first = _metrics(toy_run, 10)
  assert first['free/total'] == 393  # round(0.01 · 39,328)
  modules = [
    value
    for name, value in first.items()
    if re.fullmatch('free/(encoder|decoder|token_embedder).*', name)
  ]
  assert sum(modules) == 393
  for name in ('loss', 'accuracy', 'learning_rate', 'gradient_norm'):
    assert f'train/{name}' in first
  assert 0 <= _metrics(toy_run, 20)['free/churn'] < 1
  last, about = subset.load(toy_run / 'last.dst')
  assert last.size == 393
  assert about['seed']['fingerprint'] == seeds.load_seed(toy_seed).fingerprint
  assert about['step'] == 40
  assert sorted(p.name for p in (toy_run / 'checkpoints').iterdir()) == [
    '30',
    '40',
  ]
  assert list(toy_run.glob('events.out.tfevents.*'))


def test_eval_repeats_the_evaluation_of_training(toy_run, toy_seed, tmp_path):
  results = _evaluate(toy_run, tmp_path / 'run')
  assert results['step'] == 40
  trained = _metrics(toy_run, 40)
  names = {'eval/loss', 'eval/accuracy', 'toy/exact_match'}
  assert names <= results.keys()
  for name in names:
    assert results[name] == pytest.approx(trained[name], abs=1e-6)
  step = ['--gin.CHECKPOINT_STEP=30']
  earlier = _evaluate(toy_run, tmp_path / 'step', *step)
  assert earlier['step'] == 30
  assert earlier['eval/loss'] != results['eval/loss']
  # Nor does it matter in which form the result comes.
  of_file = _evaluate(toy_run / 'last.dst', tmp_path / 'file')
  assert {n: of_file[n] for n in names} == {n: results[n] for n in names}
  zero_shot = _evaluate(toy_seed, tmp_path / 'seed')
  assert zero_shot['step'] == 60
  assert zero_shot['eval/loss'] > results['eval/loss']


def test_a_subset_file_is_for_its_own_seed(toy_run, toy_seed, tmp_path):
  seed = seeds.load_seed(toy_seed)
  other = jax.tree.map(lambda x: x + 1, seed.params)
  t5x_checkpoint.save(tmp_path / 'other', other, 1)
  with pytest.raises(UserError, match=r'is not the seed of .*last\.dst'):
    seeds.load_seed(toy_run / 'last.dst', seed_path=str(tmp_path / 'other'))
  t5x_checkpoint.save(tmp_path / 'moved', seed.params, 1)
  loaded = seeds.load_seed(
    toy_run / 'last.dst', seed_path=str(tmp_path / 'moved')
  )
  assert loaded.fingerprint == seeds.load_seed(toy_run).fingerprint


def test_the_best_checkpoint_leaves_a_file_too(toy_seed, tmp_path):
  _finetune(
    toy_seed,
    tmp_path / 'run',
    # It only gets worse.
    *commands.flags(KEEP_BEST_BY='eval/loss', LEARNING_RATE=2.0, EVAL_PERIOD=5),
    steps=10,
  )
  found = json.loads((tmp_path / 'run' / 'best.json').read_text())
  assert found['step'] == 5
  last, about_last = subset.load(tmp_path / 'run' / 'last.dst')
  best, about_best = subset.load(tmp_path / 'run' / 'best.dst')
  assert (about_best['step'], about_last['step']) == (5, 10)
  assert about_best['scores']['eval/loss'] == found['value']
  assert about_best['scores']['eval/loss'] < about_last['scores']['eval/loss']
  assert subset.diff(best, last) != subset.diff(best, best)
  run = seeds.load_run(tmp_path / 'run', 5)
  of_file = seeds.load_seed(tmp_path / 'run' / 'best.dst')
  assert of_file.fingerprint == fingerprint.fingerprint(run.params)


def test_the_size_of_the_file_is_known_before(toy_run):
  report = json.loads((toy_run / 'report.json').read_text())
  actual = (toy_run / 'last.dst').stat().st_size
  assert report['file_bytes'] == actual
  assert report['file_bytes_predicted'] == pytest.approx(actual, rel=0.05)


def test_infer_from_a_file_and_from_a_split(toy_run, tmp_path):
  rows = _infer(toy_run, tmp_path / 'split')
  assert len(rows) == 10
  assert all(row['targets'] == row['inputs'].upper() for row in rows)
  assert len({row['prediction'] for row in rows}) > 1
  file = tmp_path / 'inputs.txt'
  # A separator that Python takes for the end of a line is none.
  texts = [row['inputs'] for row in rows[:5]] + ['', 'ab\u2028c', 'a' * 40]
  file.write_text('\n'.join(texts) + '\n')
  of_file = _infer(
    toy_run,
    tmp_path / 'file',
    *commands.flags(INPUT_FILE=file, INFER_SPLIT='none', INFER_BATCH_SIZE=3),
  )
  assert [row['inputs'] for row in of_file] == texts
  for row, other in zip(of_file, rows[:5], strict=False):
    assert row['prediction'] == other['prediction']


def test_infer_reads_files_as_people_write_them(toy_seed, tmp_path):
  def predictions(name, content, **flags):
    (tmp_path / name).write_bytes(content)
    return _infer(
      toy_seed,
      tmp_path / f'of {name}',
      *commands.flags(INPUT_FILE=tmp_path / name, **flags),
    )

  plain = predictions('plain.txt', b'abc\nhgf\n')
  assert [row['inputs'] for row in plain] == ['abc', 'hgf']
  windows = 'abc\r\nhgf\r\n'.encode('utf-8-sig')
  assert predictions('windows.txt', windows) == plain
  objects = b'{"inputs": "abc", "id": 1}\n\n{"inputs": "hgf"}\n'
  assert predictions('rows.jsonl', objects) == plain
  table = b'inputs\ttargets\nabc\tABC\nhgf\tHGF\n'
  scored = [row | {'targets': row['inputs'].upper()} for row in plain]
  assert predictions('rows.tsv', table) == scored
  several = b'{"inputs": "abc", "targets": "A", "references": ["A", "B"]}'
  (row,) = predictions('references.jsonl', several)
  assert row == plain[0] | {'targets': 'A', 'references': ['A', 'B']}
  (row,) = predictions('return.txt', b'ab\rc')
  assert row['inputs'] == 'ab\rc'
  for name, content, expected in [
    (
      'a.jsonl',
      b'{"input": "abc"}',
      "jsonl:1 has no 'inputs'; did you mean 'i",
    ),
    ('a.tsv', b'abc', 'tsv:1 has 0 tabs instead of one'),
    ('a.json', b'[{"inputs": "abc"}]', 'is named .json: make it .txt'),
    ('b.txt', b'abc\n\xff', 'txt:2 is not UTF-8'),
    ('c.txt', b'', 'holds no input'),
  ]:
    with pytest.raises(UserError, match=expected):
      predictions(name, content)


def test_infer_leaves_predictions_for_other_inputs_alone(toy_seed, tmp_path):
  def predictions(*inputs, name='a.txt', **flags):
    (tmp_path / name).write_text('\n'.join(inputs) + '\n')
    flags = commands.flags(INPUT_FILE=tmp_path / name, **flags)
    return _infer(toy_seed, tmp_path / 'out', *flags)

  first = predictions('abc', 'hgf')
  # The same again, with more after them, or under another name.
  assert predictions('abc', 'hgf', name='b.txt') == first
  assert predictions('abc', 'hgf', 'a')[:2] == first
  written = (tmp_path / 'out' / 'predictions.jsonl').read_bytes()
  for inputs in (['abc'], ['hgf', 'abc', 'a'], ['abc', 'hgf', 'b']):
    with pytest.raises(UserError, match='choose another INFER_OUTPUT_DIR'):
      predictions(*inputs)
  with pytest.raises(UserError, match='choose another INFER_OUTPUT_DIR'):
    predictions('abc', 'hgf', 'a', INFER_EXAMPLES=2)
  assert (tmp_path / 'out' / 'predictions.jsonl').read_bytes() == written
  (tmp_path / 'out' / 'predictions.jsonl').write_text('no row of ours\n')
  with pytest.raises(UserError, match=r'predictions\.jsonl:1 is not JSON'):
    predictions('abc')


def test_a_seed_in_any_format_gives_the_same_run(toy_seed, toy_run, tmp_path):
  seed = seeds.load_seed(toy_seed)
  t5x_checkpoint.save(tmp_path / 't5x' / 'checkpoint_7', seed.params, 7)
  hf_checkpoint.save(tmp_path / 'hf', seed.params, network.Transformer(CONFIG))
  subsets = []
  for name in ('t5x', 'hf'):
    assert seeds.load_seed(tmp_path / name).fingerprint == seed.fingerprint
    folder = tmp_path / f'run_{name}'
    subsets.append(_finetune(tmp_path / name, folder, steps=10))
    losses = [_metrics(f, 10)['train/loss'] for f in (folder, toy_run)]
    assert losses[0] == losses[1]
  for name, values in subsets[0].values.items():
    assert values.tobytes() == subsets[1].values[name].tobytes()
    np.testing.assert_array_equal(
      subsets[0].positions[name], subsets[1].positions[name]
    )


@pytest.fixture(scope='module')
def plain_run(toy_seed, tmp_path_factory):
  """A run on one device, unscanned, without dropout."""
  folder = tmp_path_factory.mktemp('plain')
  _finetune(toy_seed, folder, '--gin.DROPOUT_RATE=0.0', steps=20)
  return folder


def _assert_nearly_the_same(folder, other):
  """Asserts equality up to a few components, which differ by rounding."""
  ours, theirs = (subset.load(f / 'last.dst')[0] for f in (folder, other))
  assert ours.size == theirs.size == 393
  assert _overlap(ours, theirs) > 0.95
  for name in 'train/loss', 'eval/loss':
    found, wanted = (_metrics(f, 20)[name] for f in (folder, other))
    assert found == pytest.approx(wanted, abs=1e-3)


@pytest.mark.slow
def test_scanned_layers_train_like_unscanned_ones(
  toy_seed, plain_run, tmp_path
):
  # Without dropout: scanned layers draw it differently.
  options = [
    '--gin.network.T5Config.scan_layers=True',
    '--gin.DROPOUT_RATE=0.0',
  ]
  folder = tmp_path / 'scanned'
  _finetune(toy_seed, folder, *options, steps=10)
  # It resumes from its own checkpoint.
  _finetune(toy_seed, folder, *options, steps=20)
  _assert_nearly_the_same(folder, plain_run)
  # Its checkpoint is one of the unscanned network, too.
  results = _evaluate(folder, tmp_path / 'eval')
  assert results['eval/loss'] == pytest.approx(
    _metrics(folder, 20)['eval/loss'], abs=1e-5
  )


@pytest.mark.slow
def test_eight_devices_in_groups_of_two(toy_seed, plain_run, tmp_path):
  options = ['--gin.MODEL_PARALLELISM=2', '--gin.DROPOUT_RATE=0.0']
  environment = {
    'XLA_FLAGS': commands.xla_flags('--xla_force_host_platform_device_count=8')
  }
  folder = tmp_path / 'mesh'
  for steps in 10, 20:  # It resumes.
    _finetune(
      toy_seed,
      folder,
      *options,
      steps=steps,
      how=functools.partial(commands.run, environment=environment),
    )
  _assert_nearly_the_same(folder, plain_run)
