"""Whole runs of T5X with our methods, on the toy task."""

import json
import signal
import time

import binaries
import commands
from flax import serialization
import jax
import numpy as np
import pytest

from dst_t5x import subsets
from dst_t5x.checkpoints import seeds
from dst_t5x.checkpoints import subset_command
from dst_t5x.checkpoints import t5x_checkpoint
from dst_t5x.core import parts


def _changed(folder, seed):
  """Returns path -> how many components differ from the seed."""
  before = parts.flatten(seeds.load_seed(seed).params)
  after = parts.flatten(seeds.load_seed(folder).params)
  assert before.keys() <= after.keys()
  return {
    path: int(np.sum(x.view(np.uint32) != before[path].view(np.uint32)))
    if path in before
    else x.size
    for path, x in after.items()
  }


@pytest.fixture(scope='module')
def dst_run(toy_seed, tmp_path_factory):
  """A run of DST in T5X; treat it as read-only."""
  folder = tmp_path_factory.mktemp('t5x') / 'dst'
  binaries.call('train', *binaries.finetune(toy_seed, 'dst', folder))
  return folder


def test_dst_changes_its_budget_and_nothing_else(dst_run, toy_seed):
  changed = _changed(dst_run / 'checkpoint_20', toy_seed)
  size = sum(x.size for x in jax.tree.leaves(seeds.load_seed(toy_seed).params))
  assert sum(changed.values()) == round(0.01 * size)


def test_the_subset_is_a_file(dst_run, toy_seed, tmp_path, capsys):
  arguments = 'extract', dst_run / 'checkpoint_20', '--seed', toy_seed
  output = tmp_path / 'a.dst'
  assert not subset_command.main(
    [*map(str, arguments), '--output', str(output)]
  )
  capsys.readouterr()
  found, about = subsets.load(output)
  assert found.size == sum(_changed(dst_run, toy_seed).values())
  assert about['step'] == 20
  # It is the same model for either engine, and for either reader.
  tuned = commands.fingerprint(dst_run / 'checkpoint_20')
  assert commands.fingerprint(output) == tuned


def _rows(path):
  return [json.loads(row) for row in path.read_text().splitlines()]


@pytest.mark.parametrize(
  ('kind', 'decoder'),
  [('t5x', 'GreedyDecoder'), ('dst', 'GreedyDecoder'), ('t5x', 'BeamSearch')],
)
def test_both_engines_decode_alike(kind, decoder, dst_run, toy_run, tmp_path):
  path = {'t5x': dst_run / 'checkpoint_20', 'dst': toy_run / 'last.dst'}[kind]
  about = {'CHECKPOINT_PATH': path}
  file = tmp_path / 'decoder.gin'
  file.write_text(f"""
    from __gin__ import dynamic_registration
    from dst_t5x.models import decoding
    DECODER = @decoding.{decoder}()
  """)
  for folder, call, run in (
    ('theirs', binaries.call, 'gin/t5x/infer.gin'),
    ('ours', commands.call, 'gin/runs/infer.gin'),
  ):
    call(
      'infer',
      binaries.TOY,
      f'--gin_file={run}',
      f'--gin_file={file}',
      *commands.flags(**about, INFER_OUTPUT_DIR=tmp_path / folder),
    )
  theirs = _rows(tmp_path / 'theirs/toy-predict.jsonl-00000-of-00001')
  ours = _rows(tmp_path / 'ours/predictions.jsonl')
  assert len(theirs) == len(ours) == 10
  text = 'inputs_pretokenized'
  assert {row['inputs'][text]: row['prediction'] for row in theirs} == {
    row['inputs']: row['prediction'] for row in ours
  }
  assert any(row['prediction'] for row in ours)


def test_both_engines_score_alike(dst_run, tmp_path):
  path = dst_run / 'checkpoint_20'
  flags = commands.flags(CHECKPOINT_PATH=path, EVAL_OUTPUT_DIR=tmp_path)
  binaries.call('eval', binaries.TOY, '--gin_file=gin/t5x/eval.gin', *flags)
  theirs = _rows(tmp_path / 'inference_eval/toy-metrics.jsonl')[-1]
  commands.call('eval', binaries.TOY, '--gin_file=gin/runs/eval.gin', *flags)
  ours = json.loads((tmp_path / 'results.json').read_text())
  expected = {'step': ours['step'], 'exact_match': ours['toy/exact_match']}
  assert theirs == expected


def test_t5x_evaluates_only_what_has_a_step(toy_run, tmp_path):
  flags = commands.flags(
    CHECKPOINT_PATH=toy_run / 'last.dst', EVAL_OUTPUT_DIR=tmp_path
  )
  with pytest.raises(SystemExit, match=r'dst_t5x.convert .*last.dst FOLDER'):
    binaries.call('eval', binaries.TOY, '--gin_file=gin/t5x/eval.gin', *flags)


def _state(folder):
  """Returns path -> array, for a checkpoint in T5X's own format."""
  index = serialization.msgpack_restore((folder / 'checkpoint').read_bytes())
  flat = {
    name: value
    for name, value in parts.flatten(index).items()
    if isinstance(value, np.ndarray)
  }
  for file in sorted(folder.glob('*/*')):
    flat[f'{file.parent.name}/{file.name}'] = np.frombuffer(
      file.read_bytes(), np.uint8
    )
  return flat


def test_a_killed_run_resumes_to_the_bit(dst_run, toy_seed, tmp_path):
  flags = binaries.finetune(toy_seed, 'dst', tmp_path / 'run')
  log = tmp_path / 'log'
  process = binaries.start(log, 'train', *flags)
  saved = tmp_path / 'run' / 'checkpoint_10' / 'checkpoint'
  end = time.monotonic() + 240
  while not saved.exists():
    assert process.poll() is None, log.read_text()
    assert time.monotonic() < end
    time.sleep(0.05)
  process.send_signal(signal.SIGKILL)
  process.wait()
  assert not (tmp_path / 'run' / 'checkpoint_20').exists()
  binaries.call('train', *flags)
  resumed, whole = (
    _state(tmp_path / 'run/checkpoint_20'),
    _state(dst_run / 'checkpoint_20'),
  )
  assert resumed.keys() == whole.keys()
  for name, array in whole.items():
    assert array.tobytes() == resumed[name].tobytes(), name
  assert any('seed.' in name for name in whole)


@pytest.mark.parametrize(
  ('method', 'bindings', 'trained'),
  [
    ('lora', {'LORA_RANK': 2}, '/lora_'),
    ('prompt', {'PROMPT_LENGTH': 3}, 'token_embedder/prompt'),
    ('ia3', {}, '/ia3'),
    ('norms', {}, 'norm/scale'),
    ('head_only', {}, 'decoder/logits_dense/kernel'),
    ('full', {}, ''),
  ],
)
def test_a_method_changes_its_own_parameters(
  method, bindings, trained, toy_seed, tmp_path
):
  folder = tmp_path / 'run'
  flags = binaries.finetune(toy_seed, method, folder, **bindings)
  binaries.call('train', *flags)
  changed = _changed(folder / 'checkpoint_20', toy_seed)
  assert {path for path, count in changed.items() if count} == {
    path for path in changed if trained in path
  }


@pytest.mark.parametrize(
  ('method', 'bindings'),
  [
    ('random', {}),
    ('dst_no_churn', {'EPSILON': 0.01}),
    ('dst', {'KEEP_SEED': False, 'MICROBATCHES': 2}),
    ('dst', {'SILOS': 'none', 'NORMALIZATION': 'size'}),
  ],
)
def test_a_subset_keeps_to_its_budget(method, bindings, toy_seed, tmp_path):
  folder = tmp_path / 'run'
  for steps in (10, 20):  # The second half is a resumed run.
    flags = binaries.finetune(toy_seed, method, folder, **bindings)
    binaries.call('train', *flags, f'--gin.TRAIN_STEPS={steps}')
  halves = [
    _changed(folder / f'checkpoint_{steps}', toy_seed) for steps in (10, 20)
  ]
  for changed in halves:
    # 39,328 parameters; a random subset has rows of bytes that never occur.
    assert 300 < sum(changed.values()) <= 393


def test_t5x_own_network_gives_the_same(dst_run, toy_seed, tmp_path):
  flags = binaries.finetune(toy_seed, 'dst', tmp_path / 'run', DROPOUT_RATE=0.0)
  runs = {}
  for name, files in (
    ('ours', []),
    ('theirs', ['--gin_file=gin/t5x/t5x_network.gin']),
  ):
    folder = f'--gin.MODEL_DIR={str(tmp_path / name)!r}'
    toy, method, run, *bindings = flags
    binaries.call('train', toy, *files, method, run, *bindings, folder)
    runs[name] = seeds.load_seed(tmp_path / name / 'checkpoint_20').params
  seed = seeds.load_seed(toy_seed).params
  free = {
    name: {
      (path, i)
      for path, x in parts.flatten(params).items()
      for i in np.flatnonzero(x != parts.flatten(seed)[path])
    }
    for name, params in runs.items()
  }
  assert len(free['ours']) == len(free['theirs']) == 393
  # Sums in another order decide between parameters that moved as far.
  assert len(free['ours'] & free['theirs']) >= 0.99 * 393


def test_lora_works_on_t5x_own_network(toy_seed, tmp_path):
  flags = binaries.finetune(
    toy_seed, 'lora', tmp_path / 'run', DROPOUT_RATE=0.0, LORA_DROPOUT_RATE=0.0
  )
  toy, method, run, *bindings = flags
  tuned = []
  for name, files in (
    ('ours', []),
    ('theirs', ['--gin_file=gin/t5x/t5x_network.gin']),
  ):
    folder = f'--gin.MODEL_DIR={str(tmp_path / name)!r}'
    binaries.call('train', toy, *files, method, run, *bindings, folder)
    found = t5x_checkpoint.load(tmp_path / name / 'checkpoint_20').params
    tuned.append(parts.flatten(found))
  ours, theirs = tuned
  seed = parts.flatten(seeds.load_seed(toy_seed).params)
  assert ours.keys() == theirs.keys() > seed.keys()
  for path, tensor in theirs.items():
    if path in seed:
      np.testing.assert_array_equal(tensor, seed[path])
    else:
      assert tensor.any(), path  # Its second factor began at zero.
      np.testing.assert_allclose(tensor, ours[path], atol=1e-3)


def _error(capsys, *flags):
  with pytest.raises(SystemExit) as stop:
    binaries.call('train', *flags)
  return str(stop.value)


def test_a_run_without_a_seed_fails_at_the_start(toy_seed, tmp_path, capsys):
  flags = binaries.finetune(tmp_path / 'sead', 'dst', tmp_path / 'run')
  assert "nothing called 'sead'" in _error(capsys, *flags)
  flags = binaries.finetune(toy_seed, 'dst', tmp_path / 'run')
  # T5X then starts from random parameters.
  scratch = '--gin.utils.CheckpointConfig.restore=None'
  assert 'the seed is not the checkpoint' in _error(capsys, *flags, scratch)
  assert not list(tmp_path.rglob('checkpoint_*'))


def test_the_trap_is_refused(toy_seed, tmp_path, capsys):
  """T5X fills a seed with random values."""
  params = seeds.load_seed(toy_seed).params
  seed = str(t5x_checkpoint.save(tmp_path, params, 60))
  file = tmp_path / 'trap.gin'
  file.write_text("""
    from __gin__ import dynamic_registration
    from t5x import checkpoints
    from t5x import utils
    utils.RestoreCheckpointConfig.checkpointer_cls = @checkpoints.Checkpointer
    utils.RestoreCheckpointConfig.fallback_to_scratch = True
    utils.RestoreCheckpointConfig.assignment_map = [
      ('state/(seed|projection|refused|param_states).*', None),
    ]
  """)
  flags = binaries.finetune(seed, 'dst', tmp_path / 'run')
  error = _error(capsys, *flags, f'--gin_file={file}')
  assert 'the seed is not the checkpoint' in error
  assert not list((tmp_path / 'run').rglob('checkpoint_*'))
