"""A seed in bfloat16: every step as with a seed in float32, bit for bit."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_t5

from dst_t5x.core.errors import UserError
from dst_t5x.engine import narrow
from dst_t5x.engine import optimizers
from dst_t5x.engine import trainer as trainer_lib
from dst_t5x.method import family
from dst_t5x.method import moved
from dst_t5x.method import projection
from dst_t5x.models.t5 import network

CONFIG = dataclasses.replace(
  tiny_t5.CONFIG, num_encoder_layers=1, num_decoder_layers=1
)
DST = projection.SubsetProjection(epsilon=0.02)
METHODS = {
  'dst': DST,
  'normalized': dataclasses.replace(
    DST, silos='none', normalization='mean', distance='absolute'
  ),
  'no churn': dataclasses.replace(DST, churn=False),
  'random': dataclasses.replace(DST, distance='random', threshold='sort'),
  'seed rebuilt': dataclasses.replace(DST, keep_seed=False),
  'shrinking': dataclasses.replace(
    DST, epsilon_schedule='linear', epsilon_start=0.1, epsilon_steps=3
  ),
  'fixed': family.make('shira_magnitude', 0.02),
  'spiel': family.make('spiel', 0.02, interval=2, accumulate=1),
  'reselecting': family.make('gasdu', 0.02, interval=2),
}
_STEPS = 4


@pytest.fixture(scope='module')
def seed():
  """Parameters that are bfloat16, with zeros of both signs and subnormals."""
  generator = np.random.default_rng(0)

  def random(leaf):
    noise = generator.standard_normal(leaf.shape, np.float32)
    x = (noise * leaf.shape[0] ** -0.5).astype(jnp.bfloat16)
    x.flat[:4] = np.array([0.0, -0.0, 1e-39, -1e-39], jnp.bfloat16)
    return x.astype(np.float32)

  return jax.tree.map(random, tiny_t5.shapes(CONFIG))


@pytest.fixture(scope='module')
def batch():
  """Six rows whose targets are their inputs."""
  tokens = np.random.default_rng(1).integers(2, 48, (6, 8)).astype(np.int32)
  return {
    'encoder_input_tokens': tokens,
    'decoder_input_tokens': np.pad(tokens[:, :-1], ((0, 0), (1, 0))),
    'decoder_target_tokens': tokens,
    'decoder_loss_weights': np.ones_like(tokens),
  }


def _trainer(method, make=optimizers.adafactor, **options):
  return trainer_lib.Trainer(
    network=network.Transformer(dataclasses.replace(CONFIG, dropout_rate=0.1)),
    optimizer=make(optimizers.schedule(0.05)),
    projection=method,
    **options,
  )


def _run(trainer, seed, batch, steps=_STEPS):
  """Returns the last state with all of θ, and the metrics of all steps."""
  room = trainer.room(seed)
  keeps = trainer.projection.keep_seed or room is not None
  kept = narrow.narrowed(trainer.seed_dtype, seed) if keeps else ()
  kept = jax.tree.map(jnp.asarray, kept)
  state = jax.jit(trainer.init)(jax.tree.map(jnp.asarray, seed))
  state = state._replace(params=narrow.held(state.params, kept, room))
  step, rows = jax.jit(trainer.train_step), []
  constants = trainer_lib.Constants(kept)
  for i in range(steps):
    state, metrics = step(
      state, constants, batch, jax.random.key(0), np.bool_(i % 2)
    )
    rows.append(metrics)
  theta = narrow.Held(state.params, kept).theta()
  return state._replace(params=theta), rows


def _assert_same(one, other):
  assert jax.tree.structure(one) == jax.tree.structure(other)
  for (path, a), b in zip(
    jax.tree.leaves_with_path(one), jax.tree.leaves(other), strict=True
  ):
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path


@pytest.mark.parametrize('name', METHODS)
def test_steps_are_those_of_float32(seed, batch, name):
  make = optimizers.adamw if name == 'fixed' else optimizers.adafactor
  whole, rows = _run(_trainer(METHODS[name], make), seed, batch)
  theta, narrow_rows = _run(
    _trainer(METHODS[name], make, seed_dtype='bfloat16'), seed, batch
  )
  _assert_same(whole, theta)
  assert [int(row.pop('lost')) for row in narrow_rows] == [0] * _STEPS
  _assert_same(rows, narrow_rows)
  differ = jax.tree.map(
    lambda a, b: int((np.asarray(a).view(np.uint32) != b.view(np.uint32)).sum()),
    theta.params,
    seed,
  )
  assert sum(jax.tree.leaves(differ)) > 0
