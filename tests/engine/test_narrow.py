"""A seed in bfloat16: every step as with a seed in float32, bit for bit."""

import dataclasses

import decoder_only
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dst_t5x.adapters import dora
from dst_t5x.core.errors import UserError
from dst_t5x.engine import narrow
from dst_t5x.engine import optimizers
from dst_t5x.engine import trainer as trainer_lib
from dst_t5x.method import api
from dst_t5x.method import family
from dst_t5x.method import moved
from dst_t5x.method import projection
from dst_t5x.models import adapted
from dst_t5x.models import api as api_of_models

NETWORK = decoder_only.tiny('llama3', num_layers=1, dropout_rate=0.1)
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
# The others take longer to compile.
_FAST = ('dst',)


@pytest.fixture(scope='module')
def seed():
  """Parameters that are bfloat16, with zeros of both signs and subnormals."""

  def narrow(x):
    x = x.astype(jnp.bfloat16)
    x.flat[:4] = np.array([0.0, -0.0, 1e-39, -1e-39], jnp.bfloat16)
    return x.astype(np.float32)

  return jax.tree.map(narrow, decoder_only.random_params(NETWORK))


@pytest.fixture(scope='module')
def batch():
  """Six rows of random tokens, of which every feature has some."""
  random = np.random.default_rng(1)
  shapes = NETWORK.batch_shapes({'inputs': 6, 'targets': 4}, 6, False)
  tokens = {
    name: random.integers(2, 48, shape).astype(np.int32)
    for name, shape in shapes.items()
  }
  weights = [name for name in tokens if 'weights' in name]
  return tokens | {name: np.ones_like(tokens[name]) for name in weights}


def _trainer(method, make=optimizers.adafactor, **options):
  return trainer_lib.Trainer(
    network=NETWORK,
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


@pytest.mark.parametrize(
  'name',
  [
    pytest.param(name, marks=[] if name in _FAST else pytest.mark.slow)
    for name in METHODS
  ],
)
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
    lambda a, b: int(
      (np.asarray(a).view(np.uint32) != b.view(np.uint32)).sum()
    ),
    theta.params,
    seed,
  )
  assert sum(jax.tree.leaves(differ)) > 0


def test_a_method_that_changes_more_than_it_says_is_found(seed):
  room = 10
  # On the host, as XLA would flush subnormals.
  params = jax.tree.map(lambda x: x + np.float32(1) if x.ndim == 1 else x, seed)
  changed = sum(x.size for x in jax.tree.leaves(seed) if x.ndim == 1)
  kept = narrow.narrowed('bfloat16', seed)
  kept = jax.tree.map(jnp.asarray, kept)
  held = narrow.Held(moved.listed(params, kept, room), kept)
  assert int(held.metrics()['lost']) == changed - room
  enough = narrow.Held(moved.listed(params, kept, changed), kept)
  assert int(enough.metrics()['lost']) == 0
  _assert_same(enough.theta(), params)


@dataclasses.dataclass(frozen=True)
class _Everything(api.Projection):
  """A user's method that keeps a seed and frees all parameters."""

  def free(self, shapes):
    return sum(x.size for x in jax.tree.leaves(shapes))


@pytest.mark.parametrize(
  ('method', 'message'),
  [
    (projection.NoProjection(), 'can change all parameters that it trains'),
    (_Everything(), 'can change all parameters that it trains'),
    (family.make('lt_sft', 0.1), 'can change all parameters that it trains'),
    (dataclasses.replace(DST, threshold='iterative'), "THRESHOLD = 'exact'"),
  ],
)
def test_methods_that_a_list_does_not_fit(seed, method, message):
  with pytest.raises(UserError, match=message) as caught:
    _trainer(method, seed_dtype='bfloat16').room(seed)
  assert "SEED_DTYPE = 'float32'" in str(caught.value)
  assert _trainer(method).room(seed) is None


def test_a_seed_that_is_not_bfloat16(seed):
  trainer = _trainer(DST, seed_dtype='bfloat16')
  trainer.check_seed(seed, 'here')
  other = jax.tree.map(lambda x: x * np.float32(1.001), seed)
  with pytest.raises(UserError, match=r'here .* --dtype=bfloat16'):
    trainer.check_seed(other, 'here')
  _trainer(DST).check_seed(other, 'here')


def test_another_dtype():
  with pytest.raises(UserError, match='SEED_DTYPE'):
    _trainer(DST, seed_dtype='float16')


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_frozen_parameters(batch, dtype):
  """1 + scale, the norm of a kernel, and a tied table are those of float32."""
  base = decoder_only.tiny('gemma', num_layers=1, dtype=dtype)
  adapter = dora.DoRA(rank=2, targets='.*attention/(query|out)')
  trainer = trainer_lib.Trainer(
    network=adapted.with_adapter(base, adapter),
    optimizer=optimizers.adafactor(optimizers.schedule(0.05)),
    projection=projection.NoProjection(),
    seed_dtype='bfloat16',
  )
  shapes = api_of_models.shapes(trainer.network)
  random = np.random.default_rng(2)
  params = jax.tree.map(
    lambda x: random.standard_normal(x.shape, np.float32), shapes
  )
  trained, frozen = trainer.split(params)
  kept = jax.tree.map(lambda x: x.astype(jnp.bfloat16), frozen)
  frozen = jax.tree.map(lambda x: x.astype(np.float32), kept)
  narrowed = narrow.narrowed('bfloat16', frozen)
  assert {x.dtype for x in jax.tree.leaves(narrowed)} == {
    np.dtype(jnp.bfloat16)
  }
  gradient = jax.jit(trainer._gradients)
  key = jax.random.key(0)
  one, other = (gradient(trained, x, batch, key) for x in (frozen, narrowed))
  _assert_same(one, other)
  assert all(np.any(x) for x in jax.tree.leaves(one[0]))
