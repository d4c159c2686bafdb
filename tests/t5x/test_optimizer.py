"""The optimizer around one of T5X's: step, state, and check of the seed."""

import engines
import flax
from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from t5x import adafactor
from t5x import optimizers

from dst_t5x.adapters import lora
from dst_t5x.core.errors import UserError
from dst_t5x.method import projection as projection_lib
from dst_t5x.models import adapted
from dst_t5x.models.t5 import network as network_lib
from dst_t5x.t5x import optimizer as optimizer_lib
from dst_t5x.t5x import trainer as trainer_lib

_NETWORK = network_lib.Transformer(engines.CONFIG)
_SHAPES = {'wi': {'kernel': (40, 30)}, 'wo': {'kernel': (30, 40)}, 'n': (9,)}
_HALF = projection_lib.SubsetProjection(epsilon=0.5)


def _tree(seed):
  random = np.random.default_rng(seed)
  return flax.core.freeze(
    jax.tree.map(
      lambda shape: jnp.asarray(random.standard_normal(shape, np.float32)),
      _SHAPES,
      is_leaf=lambda node: isinstance(node, tuple),
    )
  )


def _adafactor():
  return adafactor.Adafactor(learning_rate=0.1)


def _multi():
  """Returns an optimizer with two learning rates, and none for one tensor."""
  of = traverse_util.ModelParamTraversal
  return optimizers.MultiOptimizer(
    [
      (of(lambda path, _: '/wi/' in path), adafactor.Adafactor(0.1)),
      (of(lambda path, _: '/wo/' in path), adafactor.Adafactor(0.2)),
    ]
  )


def _wrapped(inner=_adafactor, projection=_HALF, trained=None):
  return optimizer_lib.SubsetOptimizer(inner(), _NETWORK, projection, trained)


def _steps(definition, count=3, seed=0):
  optimizer = definition.begin(_tree(seed))
  for i in range(count):
    optimizer = jax.jit(lambda o, g: o.apply_gradient(g))(
      optimizer, _tree(10 + i)
    )
  return optimizer


def test_a_step_is_the_inner_one_and_the_projection():
  projection = projection_lib.SubsetProjection(epsilon=0.1)
  found = _steps(_wrapped(projection=projection))
  seed = flax.core.unfreeze(_tree(0))
  inner, state = _adafactor().create(_tree(0)), projection.init(seed)
  for i in range(3):
    inner = inner.apply_gradient(_tree(10 + i))
    params, state = projection.apply(
      flax.core.unfreeze(inner.target), seed, state
    )
    inner = inner.replace(target=flax.core.freeze(params))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5),
    found.target,
    inner.target,
  )
  differs = jax.tree.map(lambda a, b: np.sum(a != b), found.target, _tree(0))
  assert sum(jax.tree.leaves(differs)) == round(0.1 * 2409)


def test_the_initial_seed_is_no_number():
  state = _wrapped().init_state(_tree(0))
  assert all(np.isnan(x).all() for x in jax.tree.leaves(state.seed))
  with pytest.raises(UserError, match='is not the checkpoint'):
    trainer_lib.check_seed(_wrapped(), _tree(0), state)


def test_the_guard():
  """A seed with other values is refused; a run that has begun is not."""
  optimizer = _steps(_wrapped())
  definition, state = optimizer.optimizer_def, optimizer.state
  trainer_lib.check_seed(definition, optimizer.target, state)
  with pytest.raises(UserError, match='2,409 of 2,409 parameters differ'):
    trainer_lib.check_seed(
      definition, optimizer.target, state.replace(seed=_tree(1))
    )
  smaller = _wrapped(projection=projection_lib.SubsetProjection(epsilon=0.1))
  with pytest.raises(UserError, match='where the budget is 241'):
    trainer_lib.check_seed(smaller, optimizer.target, state)
  nothing = _wrapped(projection=projection_lib.NoProjection())
  trainer_lib.check_seed(nothing, _tree(0), nothing.init_state(_tree(0)))


@pytest.mark.parametrize(
  'inner',
  [_adafactor, _multi, lambda: optimizers.OptaxWrapper(optax.adam(0.1))],
)
@pytest.mark.parametrize(
  'options',
  [
    {},
    {'churn': False},
    {'keep_seed': False},
    {'silos': 'none', 'normalization': 'size'},
  ],
)
def test_a_state_survives_a_checkpoint(inner, options):
  projection = projection_lib.SubsetProjection(epsilon=0.1, **options)
  definition = _wrapped(inner, projection)
  optimizer = _steps(definition)
  # As T5X stores it: nested dicts, through bytes.
  stored = flax.serialization.msgpack_restore(
    flax.serialization.msgpack_serialize(jax.device_get(optimizer.state_dict()))
  )
  restored = definition.create(_tree(5)).restore_state(stored)
  assert jax.tree.structure(restored) == jax.tree.structure(optimizer)
  for a, b in zip(
    jax.tree.leaves(restored), jax.tree.leaves(optimizer), strict=True
  ):
    assert a.dtype == b.dtype
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_t5x_may_drop_what_is_empty():
  optimizer = _steps(_wrapped())
  flat = traverse_util.flatten_dict(optimizer.state_dict(), sep='/')
  stored = traverse_util.unflatten_dict(flat, sep='/')
  assert 'sparse_seed' not in stored['state']['projection']
  restored = optimizer.restore_state(stored)
  assert jax.tree.structure(restored) == jax.tree.structure(optimizer)


def test_without_a_projection_the_state_is_that_of_t5x():
  definition = _wrapped(projection=projection_lib.NoProjection())
  ours = _steps(definition).state_dict()
  plain = _adafactor().create(_tree(0)).state_dict()
  assert jax.tree.structure(ours) == jax.tree.structure(plain)


def test_every_inner_optimizer_moves_its_own():
  changed = jax.tree.map(
    lambda a, b: int(np.sum(a != b)), _steps(_wrapped(_multi)).target, _tree(0)
  )
  assert changed['wi']['kernel'] == changed['wo']['kernel'] == 600
  assert changed['n'] == 0


def test_what_is_not_trained_stays():
  none = projection_lib.NoProjection()
  optimizer = _steps(_wrapped(projection=none, trained=['w./kernel']))
  np.testing.assert_array_equal(optimizer.target['n'], _tree(0)['n'])
  assert 'n' not in optimizer.state.param_states
  assert (optimizer.target['wi']['kernel'] != _tree(0)['wi']['kernel']).all()


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_a_step_that_is_not_finite_changes_nothing(bad):
  optimizer = _steps(_wrapped())
  gradient = flax.core.unfreeze(_tree(30))
  gradient['wi']['kernel'] = gradient['wi']['kernel'].at[3, 4].set(bad)
  step = jax.jit(lambda o, g: o.apply_gradient(g))
  after = step(optimizer, flax.core.freeze(gradient))
  assert after.state.step == optimizer.state.step + 1
  assert after.state.refused_in_row == 1
  same = after.state.replace(
    step=optimizer.state.step, refused_in_row=jnp.int32(0)
  )
  for a, b in zip(
    jax.tree.leaves((after.target, same)),
    jax.tree.leaves((optimizer.target, optimizer.state)),
    strict=True,
  ):
    np.testing.assert_array_equal(a, b)
  assert step(after, _tree(31)).state.refused_in_row == 0


def test_learning_rates_reach_the_inner_optimizer():
  for inner in (_adafactor, _multi):
    definition = _wrapped(inner)
    after = definition.begin(_tree(0)).apply_gradient(
      _tree(1), learning_rate=0.0
    )
    jax.tree.map(np.testing.assert_array_equal, after.target, _tree(0))


def test_what_does_not_go_together():
  network = network_lib.Transformer(engines.CONFIG)
  with_lora = adapted.with_adapter(network, lora.LoRA())
  with pytest.raises(UserError, match='use one method file'):
    optimizer_lib.SubsetOptimizer(_adafactor(), with_lora, _HALF)
