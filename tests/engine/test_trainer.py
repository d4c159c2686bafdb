"""The training step: one step in detail, and a few in a row."""

import dataclasses
import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_t5

from dst_t5x.core import stacking
from dst_t5x.core.errors import UserError
from dst_t5x.engine import losses
from dst_t5x.engine import optimizers
from dst_t5x.engine import trainer as trainer_lib
from dst_t5x.method import projection
from dst_t5x.models.t5 import network

EPSILON = 0.02
DST = projection.SubsetProjection(epsilon=EPSILON)
CONFIG = dataclasses.replace(
  tiny_t5.CONFIG, num_encoder_layers=2, num_decoder_layers=1
)

# The losses of five steps of this very implementation.
GOLDEN = [4.591355, 4.543264, 4.49834, 4.465272, 4.440655]


@functools.cache
def _trainer(projection=DST, dropout=0.0, scan=False, **options):
  config = dataclasses.replace(CONFIG, dropout_rate=dropout, scan_layers=scan)
  return trainer_lib.Trainer(
    network=network.Transformer(config),
    optimizer=optimizers.adafactor(optimizers.schedule(0.05)),
    projection=projection,
    **options,
  )


@pytest.fixture(scope='module')
def seed():
  """Parameters of a usual scale."""
  shapes = tiny_t5.shapes(CONFIG)
  generator = np.random.default_rng(0)

  def random(key_path, leaf):
    noise = generator.standard_normal(leaf.shape, np.float32)
    is_scale = 'scale' in jax.tree_util.keystr(key_path)
    return 1 + 0.1 * noise if is_scale else noise * leaf.shape[0] ** -0.5

  return jax.tree_util.tree_map_with_path(random, shapes)


@pytest.fixture(scope='module')
def batch():
  """Six rows whose targets are their inputs, with some padding."""
  tokens = np.random.default_rng(1).integers(2, 48, (6, 8)).astype(np.int32)
  tokens[:3, 5:] = 0
  return {
    'encoder_input_tokens': tokens,
    'decoder_input_tokens': np.pad(tokens[:, :-1], ((0, 0), (1, 0))),
    'decoder_target_tokens': tokens,
    'decoder_loss_weights': (tokens > 0).astype(np.int32),
  }


@functools.cache
def _compiled(trainer):
  return jax.jit(trainer.train_step)


def _train(trainer, seed, batch, steps, key=0):
  """Yields state and metrics after each step."""
  state = trainer.init(jax.tree.map(jnp.asarray, seed))
  step, constants = _compiled(trainer), trainer_lib.Constants(seed)
  for _ in range(steps):
    state, metrics = step(
      state, constants, batch, jax.random.key(key), jnp.asarray(True)
    )
    yield state, metrics


def _differs(params, seed):
  return jax.tree.map(
    lambda a, b: np.asarray(a).view(np.uint32) != b.view(np.uint32),
    params,
    seed,
  )


def _free_of_silos(layout, params, seed):
  """Counts the components whose bits differ from the seed's, by silo."""
  counts = np.zeros(len(layout.names), int)
  differs = jax.tree.leaves(_differs(params, seed))
  for leaf, mask in zip(layout.leaves, differs, strict=True):
    for silo, part in zip(
      leaf.silos, mask.reshape(len(leaf.silos), -1), strict=True
    ):
      counts[silo] += part.sum()
  return counts.tolist()


def test_every_silo_has_its_budget_after_every_step(seed, batch):
  layout = DST.layout(seed)
  budgets = list(layout.budgets(EPSILON))
  assert sum(budgets) == round(EPSILON * layout.size)
  losses_seen = []
  masks = []
  for state, metrics in _train(_trainer(dropout=0.1), seed, batch, 10):
    assert _free_of_silos(layout, state.params, seed) == budgets
    masks.append(np.concatenate(
        [m.ravel() for m in jax.tree.leaves(_differs(state.params, seed))]
    ))  # fmt: skip
    losses_seen.append(float(metrics['loss']))
  assert losses_seen[-1] < losses_seen[0]
  # The subset is dynamic.
  assert (masks[0] != masks[-1]).any()


def test_full_finetuning_changes_everything(seed, batch):
  runs = list(_train(_trainer(projection.NoProjection()), seed, batch, 5))
  state, metrics = runs[-1]
  for path, mask in tiny_t5.flat(_differs(state.params, seed)).items():
    # Pieces and distances that do not occur in the batch have no gradient.
    assert mask.mean() > (0.2 if 'embedding' in path else 0.9), path
  assert metrics['loss'] < runs[0][1]['loss'] - 0.1


def test_golden_losses(seed, batch):
  """If the losses change, the change must be deliberate."""
  runs = _train(_trainer(), seed, batch, 5)
  found = [float(metrics['loss']) for _, metrics in runs]
  assert found == pytest.approx(GOLDEN, abs=1e-4)


def test_microbatches_give_the_step_of_the_whole_batch(seed, batch):
  whole, parts = (
    list(_train(_trainer(projection.NoProjection(), **o), seed, batch, 2))[-1]
    for o in ({}, {'microbatches': 3})
  )
  for name in ('loss', 'accuracy', 'target_tokens', 'z_loss'):
    assert parts[1][name] == pytest.approx(float(whole[1][name]), abs=1e-6)
  for one, other in zip(
    jax.tree.leaves(whole[0].params),
    jax.tree.leaves(parts[0].params),
    strict=True,
  ):
    np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.mark.parametrize('factor', typing.get_args(losses.Normalizer))
def test_microbatches_give_the_same_gradient(seed, batch, factor):
  loss = losses.Loss(loss_normalizing_factor=factor, label_smoothing=0.1)
  whole, parts = (
    jax.jit(_trainer(loss=loss, microbatches=n)._gradients)(
      seed, (), batch, jax.random.key(0)
    )[0]
    for n in (1, 2)
  )
  for one, other in zip(
    jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True
  ):
    np.testing.assert_allclose(one, other, atol=1e-6)


def test_batches_that_cannot_be_split():
  with pytest.raises(UserError, match=r'BATCH_SIZE = 6 is not .* = 4'):
    _trainer(microbatches=4).check_batch_size(6)
  with pytest.raises(UserError, match='MICROBATCHES must be a positive'):
    _trainer(microbatches=0)


def test_the_same_keys_give_the_same_run(seed, batch):
  trainer = _trainer(dropout=0.1)
  one, same, other = (
    list(_train(trainer, seed, batch, 2, key))[-1] for key in (0, 0, 1)
  )
  jax.tree.map(np.testing.assert_array_equal, one, same)
  assert one[1]['loss'] != other[1]['loss']


def test_scanned_layers_take_the_same_steps(seed, batch):
  stacked = jax.tree.map(np.asarray, stacking.stack_layers(seed))
  one = list(_train(_trainer(), seed, batch, 3))
  other = list(_train(_trainer(scan=True), stacked, batch, 3))
  for (_, metrics), (_, scanned) in zip(one, other, strict=True):
    for name, value in metrics.items():
      assert scanned[name] == pytest.approx(float(value), rel=1e-4), name
  mine = _differs(one[-1][0].params, seed)
  theirs = _differs(stacking.unstack_layers(other[-1][0].params), seed)
  wrong = jax.tree.map(lambda a, b: (a != b).sum(), mine, theirs)
  assert sum(jax.tree.leaves(wrong)) <= 2  # Where two distances nearly tie.


def test_norms_are_over_what_is_free(seed, batch):
  trainer = _trainer()
  states = [trainer.init(seed)] + [
    state for state, _ in _train(trainer, seed, batch, 3)
  ]
  metrics = list(_train(trainer, seed, batch, 3))[-1][1]
  gradients, _ = jax.jit(trainer._gradients)(
    states[2].params, (), batch, jax.random.fold_in(jax.random.key(0), 2)
  )
  update = jax.tree.map(np.subtract, states[3].params, states[2].params)
  for name, tree, state in (
    # What is free when the gradient is taken, and after the update.
    ('gradient_norm', gradients, states[2]),
    ('update_norm', update, states[3]),
  ):
    free = _differs(state.params, seed)
    squares = jax.tree.map(
      lambda x, mask: (np.asarray(x, np.float64) ** 2 * mask).sum(), tree, free
    )
    norm = np.sqrt(sum(jax.tree.leaves(squares)))
    assert metrics[name] == pytest.approx(norm, rel=1e-4)


def test_norms_are_only_taken_where_they_are_wanted(seed, batch):
  trainer = _trainer()
  _, metrics = _compiled(trainer)(
    trainer.init(seed),
    trainer_lib.Constants(seed),
    batch,
    jax.random.key(0),
    jnp.asarray(False),
  )
  assert np.isnan(metrics['gradient_norm'])
  assert np.isfinite(metrics['loss'])


def _same(a, b):
  return all(
    np.asarray(x).tobytes() == np.asarray(y).tobytes()
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  )


@pytest.mark.parametrize('churn', [True, False])
def test_a_step_without_a_finite_loss_changes_nothing(seed, batch, churn):
  method = dataclasses.replace(DST, churn=churn)
  step, constants = _compiled(_trainer(method)), trainer_lib.Constants(seed)
  state = _trainer(method).init(jax.tree.map(jnp.asarray, seed))
  weights = batch['decoder_loss_weights'].astype(np.float32)
  batch = batch | {'decoder_loss_weights': weights}
  poisoned = batch | {'decoder_loss_weights': weights * np.float32(np.nan)}
  expected = state
  for is_bad in (True, False, True, True, False):
    before = state
    state, metrics = step(
      state,
      constants,
      poisoned if is_bad else batch,
      jax.random.key(0),
      jnp.asarray(True),
    )
    if is_bad:
      assert np.isnan(metrics['loss'])
      for field in ('params', 'opt_state', 'projection_state'):
        assert _same(getattr(state, field), getattr(before, field)), field
      continue
    expected, _ = step(
      expected, constants, batch, jax.random.key(0), jnp.asarray(True)
    )
    assert _same(state.params, expected.params)
  assert int(metrics['refused_steps']) == int(state.refused_steps) == 3
  assert int(state.refused_in_row) == 0
  assert int(before.refused_in_row) == 2
  assert int(state.step) == 5


def _moves_by_the_rate(rate):
  return optax.stateless(
    lambda updates, _: jax.tree.map(lambda x: jnp.full_like(x, rate), updates)
  )


@pytest.mark.parametrize('make', [_moves_by_the_rate, None])
def test_the_reported_learning_rate_is_the_one_that_was_used(seed, batch, make):
  step = jax.jit(_decaying(make).train_step)
  weights = batch['decoder_loss_weights'].astype(np.float32)
  for refused in set(), {0}, {2, 3}, {1, 4, 7}:
    state = _decaying(make).init(jax.tree.map(jnp.asarray, seed))
    for i in range(8):
      before = _kernel(state)
      scale = np.float32(np.nan if i in refused else 1)
      state, metrics = step(
        state,
        trainer_lib.Constants(seed),
        batch | {'decoder_loss_weights': weights * scale},
        jax.random.key(0),
        jnp.asarray(False),
      )
      # A decay over six steps ends after six, whatever was refused.
      rate = float(metrics['learning_rate'])
      assert rate == pytest.approx(max(0, 1 - i / 6), abs=1e-6)
      moved = _kernel(state) - before
      rate = 0 if i in refused else rate
      # At the decay's end, the last bits of its numbers are left.
      assert (abs(moved).max() > 1e-6) == (rate > 1e-6)
      if make is not None:
        np.testing.assert_allclose(moved, rate, atol=1e-5)


def _kernel(state):
  return np.array(state.params['decoder']['logits_dense']['kernel'])


def _decaying(make):
  schedule = optimizers.schedule(1.0, decay='linear', decay_steps=6)
  return dataclasses.replace(
    _trainer(projection.NoProjection()),
    optimizer=optimizers.Optimizer(make, schedule)
    if make
    else optimizers.adafactor(schedule),
  )


@pytest.mark.parametrize('value', [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize('projection_of', [DST, projection.NoProjection()])
def test_an_update_that_is_not_finite_is_refused(
  seed, batch, value, projection_of
):
  def poisoned(updates, params):
    del params
    kernel = updates['decoder']['layers_0']['mlp']['wo']['kernel']
    updates['decoder']['layers_0']['mlp']['wo']['kernel'] = kernel.at[3, 2].set(
      value
    )
    return updates

  trainer = dataclasses.replace(
    _trainer(projection_of),
    optimizer=optimizers.Optimizer(
      lambda rate: optax.stateless(poisoned), lambda step: jnp.float32(1)
    ),
  )
  state = trainer.init(jax.tree.map(jnp.asarray, seed))
  after, metrics = jax.jit(trainer.train_step)(
    state,
    trainer_lib.Constants(seed),
    batch,
    jax.random.key(0),
    jnp.asarray(False),
  )
  assert np.isfinite(metrics['loss'])
  assert int(metrics['refused_in_row']) == 1
  assert _same(after.params, state.params)


@pytest.mark.slow
def test_trainers_that_differ_in_numbers_share_a_program(seed, batch):
  step = jax.jit(trainer_lib.Trainer.train_step)
  rest = batch, jax.random.key(0), jnp.asarray(False)

  def take(projection, base, compare=False):
    """Returns the number of compiled programs after a step."""
    schedule = optimizers.schedule(base, decay='linear', decay_steps=10)
    # All parts are equal, and no part is the same.
    trainer = trainer_lib.Trainer(
      network=network.Transformer(dataclasses.replace(CONFIG)),
      optimizer=optimizers.adafactor(schedule),
      projection=dataclasses.replace(projection),
    )
    state = trainer.init(jax.tree.map(jnp.asarray, seed))
    constants = trainer_lib.Constants(seed)
    given = step(trainer.program(seed), state, constants, *rest)
    if compare:  # With the step of which all numbers are constants.
      constant = jax.jit(trainer.train_step)(state, constants, *rest)
      for a, b in zip(*map(jax.tree.leaves, (given, constant)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
    return step._cache_size()

  random = dataclasses.replace(DST, distance='random')
  assert take(DST, 0.05) == 1
  assert take(dataclasses.replace(DST, epsilon=0.3), 0.5, compare=True) == 1
  assert take(random, 0.05) == 2
  assert take(dataclasses.replace(random, random_seed=5), 0.1, True) == 2


def test_what_cannot_be_compared_is_refused():
  class Listed(projection.NoProjection):
    __hash__ = None

  with pytest.raises(UserError, match='Listed has a setting'):
    _trainer.__wrapped__(Listed())
