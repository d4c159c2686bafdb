"""The command `python -m dst_t5x.subset`."""

import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny_t5

from dst_t5x import subsets
from dst_t5x.checkpoints import hf_checkpoint
from dst_t5x.checkpoints import subset_command
from dst_t5x.checkpoints import t5x_checkpoint
from dst_t5x.subsets import fingerprint


def _tuned(params, name, random, change=1):
  """Returns a copy with one component in ten of every tensor changed."""
  params = jax.tree.map(np.copy, params)
  for path, leaf in tiny_t5.flat(params).items():
    flat = leaf.reshape(-1)
    if name in path:
      flat[random.choice(flat.size, -(-flat.size // 10), replace=False)] += (
        change
      )
  return params


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """`seed` (`hf` is the same), `a.dst`, `b.dst`; `other`, `other.dst`."""
  root = tmp_path_factory.mktemp('subset')
  random = np.random.default_rng(0)
  seed = tiny_t5.random_params()
  t5x_checkpoint.save(root / 'seed', seed, step=12)
  hf_checkpoint.save(root / 'hf', seed, tiny_t5.NETWORK)
  other = _tuned(seed, 'logits', random)
  t5x_checkpoint.save(root / 'other', other, step=12)
  identity = fingerprint.fingerprint(seed)
  for name, part, change in (('a', 'encoder', 1), ('b', 'mlp', 2)):
    found = subsets.extract(_tuned(seed, part, random, change), seed, identity)
    about = {'seed': {'name': 'tiny'}, 'epsilon': 0.1, 'step': 40}
    subsets.save(root / f'{name}.dst', found, about)
  found = subsets.extract(seed, other, fingerprint.fingerprint(other))
  subsets.save(root / 'other.dst', found, {})
  return root


def _run(capsys, *arguments):
  """Runs the command; returns exit status, output and errors."""
  status = subset_command.main([str(a) for a in arguments])
  captured = capsys.readouterr()
  return status, captured.out, captured.err


def _error(capsys, *arguments):
  """Returns the one error line of a command that fails."""
  status, _, err = _run(capsys, *arguments)
  assert status == 1
  assert err.startswith('error: ')
  assert err.count('\n') == 1
  return err


def test_info(capsys, folder):
  status, out, _ = _run(capsys, 'info', folder / 'a.dst')
  assert status == 0
  found, _ = subsets.load(folder / 'a.dst')
  lines = out.splitlines()
  size = (folder / 'a.dst').stat().st_size
  assert lines[0] == (
    f'{folder}/a.dst: {size:,} bytes, {found.size:,} values, dst_t5x.subset/1'
  )
  assert 'epsilon: 0.1' in lines
  assert f'"fingerprint": "{found.fingerprint}"' in out
  rows = {line.split()[0]: line.split() for line in lines[4:]}
  # 3 layers, of q, k, v: 8 · 12, and out: 12 · 8; a tenth, rounded up.
  assert rows['encoder/attention'][1:-1] == ['1,152', '120', '10.4', '%']
  assert set(rows['encoder/attention'][-1]) == {'█'}
  assert rows['decoder/mlp'][1:4] == ['960', '0', '0']
  assert rows['all'][2] == f'{found.size:,}'
  _, both, _ = _run(capsys, 'info', folder / 'a.dst', folder / 'b.dst')
  assert f'\n\n{folder}/b.dst: ' in both


def test_info_shows_no_control_characters(capsys, tmp_path):
  seed = {'w': np.zeros(3, np.float32)}
  found = subsets.extract(seed, seed, 'a' * 64)
  subsets.save(tmp_path / 'a.dst', found, {'task': '\x1b[2J\x07', '\x1b': 1})
  _, out, _ = _run(capsys, 'info', tmp_path / 'a.dst')
  assert 'task: "\\u001b[2J\\u0007"' in out
  assert all(c.isprintable() or c == '\n' for c in out)


def test_verify(capsys, folder):
  files = folder / 'a.dst', folder / 'b.dst'
  status, out, _ = _run(capsys, 'verify', *files)
  assert status == 0
  assert out.count(' is whole: ') == out.count('it is for the seed ') == 2
  for seed in ('seed', 'hf'):
    status, out, _ = _run(capsys, 'verify', files[0], '--seed', folder / seed)
    assert status == 0
    assert 'it belongs to the seed ' in out
  error = _error(capsys, 'verify', *files, '--seed', folder / 'other')
  assert error.startswith(f'error: {files[0]}: it belongs to the seed with fin')


@pytest.mark.parametrize('kind', ['seed', 'hf'])
def test_apply_writes_what_the_seed_is(capsys, folder, tmp_path, kind):
  status, out, _ = _run(
    capsys, 'apply', folder / 'a.dst', '--seed', folder / kind,
    '--output', tmp_path / 'tuned',
  )  # fmt: skip
  assert status == 0
  if kind == 'hf':
    params = hf_checkpoint.load(tmp_path / 'tuned').params
  else:
    params = t5x_checkpoint.load(tmp_path / 'tuned/checkpoint_40').params
  found, _ = subsets.load(folder / 'a.dst')
  expected = subsets.apply(found, tiny_t5.random_params())
  tiny_t5.assert_same_bits(params, expected)
  assert f'fingerprint {fingerprint.fingerprint(expected)}\n' in out


def test_transformers_load_an_export(capsys, folder, tmp_path):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  for kind in ('hf', 't5x'):
    status, out, _ = _run(
      capsys, 'export', folder / 'a.dst', '--seed', folder / 'seed',
      f'--format={kind}', '--output', tmp_path / kind,
    )  # fmt: skip
    assert status == 0
    assert f'({kind})' in out
  model = transformers.T5ForConditionalGeneration.from_pretrained(
    tmp_path / 'hf'
  )
  found, _ = subsets.load(folder / 'a.dst')
  expected = subsets.apply(found, tiny_t5.random_params())
  kernel = model.encoder.block[2].layer[0].SelfAttention.q.weight
  assert torch.equal(
    kernel.T,
    torch.tensor(expected['encoder']['layers_2']['attention']['query']['kernel']),
  )  # fmt: skip
  loaded = t5x_checkpoint.load(tmp_path / 't5x/checkpoint_40')
  tiny_t5.assert_same_bits(loaded.params, expected)
  capsys.readouterr()  # What transformers say.
  error = _error(
    capsys, 'export', folder / 'a.dst', '--seed', folder / 'seed',
    '--format=hf', '--output', tmp_path / 'hf',
  )  # fmt: skip
  assert 'exists already' in error


@pytest.mark.parametrize('kind', ['seed', 'hf'])
def test_extract(capsys, folder, tmp_path, kind):
  found, _ = subsets.load(folder / 'a.dst')
  tuned = subsets.apply(found, tiny_t5.random_params())
  path = t5x_checkpoint.save(tmp_path, tuned, step=40)
  output = tmp_path / 'again.dst'
  status, out, _ = _run(
    capsys, 'extract', path, '--seed', folder / kind, '--output', output
  )
  assert status == 0
  assert f'{found.size:,} of ' in out
  again, about = subsets.load(output)
  assert about['step'] == 40
  tiny_t5.assert_same_bits(subsets.apply(again, tiny_t5.random_params()), tuned)
  for wrong, message in (
    (folder / 'sead', "did you mean 'seed'"),
    (t5x_checkpoint.save(tmp_path / 'n', _noise(), 1), 'is no subset'),
  ):
    error = _error(
      capsys, 'extract', path, '--seed', wrong, '--output', tmp_path / 'x.dst'
    )
    assert message in error
  assert not (tmp_path / 'x.dst').exists()


def _noise():
  return jax.tree.map(lambda x: x + 1, tiny_t5.random_params())


def test_overlap(capsys, folder):
  a, b = (subsets.load(folder / name)[0] for name in ('a.dst', 'b.dst'))
  expected = subsets.overlap(a, b)
  status, out, _ = _run(capsys, 'overlap', folder / 'a.dst', folder / 'b.dst')
  assert status == 0
  row = out.splitlines()[-1].split()
  assert row[:6] == [
    '1', 'and', '2', str(a.size), str(b.size), str(expected.shared)
  ]  # fmt: skip
  assert row[6:] == [
    f'{100 * expected.share:.2f}', '%', f'{100 * expected.jaccard:.2f}', '%'
  ]  # fmt: skip
  assert '\nencoder/mlp ' in out
  files = [folder / f'{name}.dst' for name in 'aba']
  assert _run(capsys, 'overlap', *files)[1].count('\n') == 3 + 4
  for rest in (['overlap'], ['combine', '--output', folder / 'c.dst']):
    assert 'two files or more' in _error(capsys, *rest, folder / 'a.dst')
  error = _error(capsys, 'overlap', folder / 'a.dst', folder / 'other.dst')
  assert 'different seeds' in error


def test_combine(capsys, folder, tmp_path):
  files = [folder / 'a.dst', folder / 'b.dst']
  output = tmp_path / 'both.dst'
  error = _error(capsys, 'combine', *files, '--output', output)
  assert 'choose the rule priority or mean' in error
  assert not output.exists()
  status, out, _ = _run(
    capsys, 'combine', *files, '--rule=mean', '--output', output
  )
  assert status == 0
  assert 'Jaccard' in out
  combined, about = subsets.load(output)
  assert f'{combined.size:,} values' in out
  assert about['combined'] == ['a.dst', 'b.dst']
  assert about['rule'] == 'mean'
  assert about['seed']['name'] == 'tiny'
  a, b = (subsets.load(file)[0] for file in files)
  assert combined.size == a.size + b.size - subsets.overlap(a, b).shared


def test_mistakes(capsys, folder, tmp_path):
  text = tmp_path / 'notes.txt'
  text.write_text('These are notes, not a subset of anything.')
  cut = tmp_path / 'cut.dst'
  cut.write_bytes((folder / 'a.dst').read_bytes()[:-1])
  for path, message in (
    (tmp_path / 'missing.dst', 'No such file'),
    (tmp_path, 'Is a directory'),
    (text, 'it is no subset file'),
    (cut, 'damaged or cut short'),
  ):
    for name in ('info', 'verify'):
      error = _error(capsys, name, path)
      assert message in error
      assert str(path) in error
  error = _error(
    capsys, 'apply', folder / 'a.dst', '--seed', folder / 'sead',
    '--output', tmp_path / 'x',
  )  # fmt: skip
  assert "did you mean 'seed'" in error
  with pytest.raises(SystemExit) as stop:
    subset_command.main(['inform', str(text)])
  assert stop.value.code == 2


def test_reading_subsets_loads_no_heavy_library(repository, folder):
  code = (
    'import sys\n'
    'from dst_t5x.checkpoints import subset_command as command\n'
    f'assert not command.main(["info", {str(folder / "a.dst")!r}])\n'
    'heavy = {"flax", "orbax", "seqio", "tensorflow", "torch"}\n'
    'print("loaded:", *sorted(heavy & sys.modules.keys()))\n'
  )
  done = subprocess.run(
    [sys.executable, '-c', code], cwd=repository, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.splitlines()[-1] == 'loaded:'


def test_as_a_program(repository, folder):
  done = subprocess.run(
    [sys.executable, '-m', 'dst_t5x.subset', 'verify', folder / 'missing.dst'],
    cwd=repository,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 1
  assert done.stdout == ''
  assert done.stderr.startswith('error: cannot read the subset file ')
