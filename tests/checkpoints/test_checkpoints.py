"""Checkpoints: which are kept, what is restored, and their sizes."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_t5

from dst_t5x import subsets
from dst_t5x.checkpoints import best as best_lib
from dst_t5x.checkpoints import run_folder
from dst_t5x.checkpoints import seeds
from dst_t5x.checkpoints import state_keys
from dst_t5x.core.errors import UserError
from dst_t5x.engine import optimizers
from dst_t5x.engine import trainer
from dst_t5x.method import projection
from dst_t5x.models.t5 import network


def _save(folder, step, value=1.0):
  folder.save(
    step,
    {'dense': {'a': np.full((2, 3), value, np.float32)}},
    {'count': np.int32(step)},
    b'position %d' % step,
    {'step': step},
  )


def _kept(path):
  return sorted(int(p.name) for p in (path / 'checkpoints').iterdir())


@pytest.mark.parametrize('keep', [1, 2])
def test_the_latest_are_kept(tmp_path, keep):
  folder = run_folder.RunFolder(tmp_path, keep)
  assert folder.latest_step is None
  assert folder.what_is_whole == 'there is no checkpoint yet'
  for step in (10, 20, 30):
    _save(folder, step, value=step)
  folder.wait()
  assert folder.steps == [10, 20, 30][-keep:]
  assert folder.what_is_whole == 'checkpoint 30 is whole'
  folder.close()
  assert _kept(tmp_path) == [10, 20, 30][-keep:]
  again = run_folder.RunFolder(tmp_path, keep)
  np.testing.assert_array_equal(
    again.parameters(30)['dense']['a'], np.full((2, 3), 30, np.float32)
  )
  like = {'count': jax.ShapeDtypeStruct((), jnp.int32)}
  assert again.state(30, like) == {'count': 30}
  assert again.position(30) == b'position 30'
  assert again.about(30) == {'format': 1, 'step': 30}
  _save(again, 40)
  again.close()
  assert _kept(tmp_path) == [10, 20, 30, 40][-keep:]


@pytest.mark.parametrize(
  ('by', 'best'), [('toy/exact_match', 20), ('eval/loss', 10)]
)
def test_the_best_is_kept_too(tmp_path, by, best):
  values = {10: 1.0, 20: 3.0, 30: 2.0, 40: float('nan')}
  known = {}

  def best_of(steps):
    here = {step: known[step] for step in steps if step in known}
    return best_lib.best_step(here, by)

  for step, value in values.items():
    # Each is saved by another process, and evaluated after it was saved.
    folder = run_folder.RunFolder(tmp_path, 1, best_of)
    _save(folder, step)
    known[step] = value
    if step == 30:  # A checkpoint that was not evaluated.
      _save(folder, 35)
    folder.close()
  folder = run_folder.RunFolder(tmp_path, 1, best_of)
  folder.tidy()
  folder.close()
  assert _kept(tmp_path) == [best, 40]


def test_what_is_no_more_the_best_goes_when_all_is_written(tmp_path):
  best = 10
  folder = run_folder.RunFolder(tmp_path, 1, lambda steps: best)
  _save(folder, 10)
  _save(folder, 20)
  folder.wait()
  best = 20
  assert folder.steps == [10, 20]
  folder.tidy()
  folder.close()
  assert _kept(tmp_path) == [20]


def test_a_reader_changes_nothing(tmp_path):
  folder = run_folder.RunFolder(tmp_path, keep=2)
  _save(folder, 1)
  _save(folder, 2)
  folder.wait()
  # Another process is about to write one.
  unfinished = tmp_path / 'checkpoints' / '3.orbax-checkpoint-tmp'
  unfinished.mkdir()
  reader = run_folder.RunFolder(tmp_path, read_only=True)
  assert reader.steps == [1, 2]
  reader.close()
  assert unfinished.exists()
  folder.close()


def test_runs_without_what_is_asked_for(tmp_path):
  run_folder.write_run_file(
    run_folder.epath.Path(tmp_path), {'method': {}, 'seed': None}
  )
  assert run_folder.is_run(tmp_path)
  with pytest.raises(UserError, match='has no checkpoint yet'):
    seeds.load_run(tmp_path)
  folder = run_folder.RunFolder(tmp_path)
  _save(folder, 5)
  folder.close()
  with pytest.raises(UserError, match=r'has no checkpoint 4, only \[5\]'):
    seeds.load_run(tmp_path, 4)


def _bytes(path: pathlib.Path) -> int:
  return sum(f.stat().st_size for f in path.rglob('*') if f.is_file())


def _small_states(epsilon):
  """Returns a seed and a state after a few steps, of T5 1.1 Small's shapes.

  The steps are those of the real optimizer and projection, on random
  gradients.
  """
  seed = jax.tree.map(jnp.asarray, tiny_t5.random_params(tiny_t5.SMALL))
  method = trainer.Trainer(
    network.Transformer(tiny_t5.SMALL),
    optimizers.adafactor(optimizers.schedule(0.01)),
    projection.SubsetProjection(epsilon=epsilon),
  )
  state = method.init(seed)
  gradients = jax.tree.map(lambda x: x[::-1] * 0.01, seed)
  updates, opt_state = method.optimizer.update(
    gradients, state.opt_state, seed, 0
  )
  return seed, state._replace(opt_state=opt_state), updates


def test_a_subset_takes_under_two_per_cent_of_the_dense_checkpoint(tmp_path):
  epsilon = 1e-4
  seed, state, updates = _small_states(epsilon)
  host = jax.tree.map(np.asarray, seed)
  size = sum(x.size for x in jax.tree.leaves(host))
  assert size == 76_961_152
  # Where the components are makes no difference to the size.
  generator = np.random.default_rng(0)
  tuned = jax.tree.map(np.copy, host)
  for leaf, update in zip(
    jax.tree.leaves(tuned), jax.tree.leaves(updates), strict=True
  ):
    count = round(epsilon * leaf.size)
    chosen = generator.choice(leaf.size, count, replace=False)
    leaf.reshape(-1)[chosen] += np.asarray(update).reshape(-1)[chosen]
  found = subsets.extract(tuned, host)
  assert found.size == pytest.approx(epsilon * size, rel=0.01)
  changing = state_keys.flatten(
    {'optimizer': state.opt_state, 'projection': state.projection_state}, seed
  )
  # Packed GSM8K's takes 750 kB at this place, compressed.
  position = generator.bytes(1_000_000)
  sizes = {}
  for name, parameters in (
    ('subset', subsets.to_arrays(found)),
    ('dense', {'dense': tuned}),
  ):
    folder = run_folder.RunFolder(tmp_path / name)
    folder.save(1, parameters, changing, position, {'step': 1})
    folder.close()
    sizes[name] = _bytes(tmp_path / name)
  assert sizes['subset'] < 0.02 * sizes['dense'], sizes
