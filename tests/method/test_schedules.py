"""Budgets that shrink."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dst_t5x.core.errors import UserError
from dst_t5x.method import api
from dst_t5x.method import projection
from dst_t5x.method import schedules
from dst_t5x.method import silos


def _seed():
  random = np.random.default_rng(0)
  return {
    'a': {'kernel': random.standard_normal((30, 40)).astype(np.float32)},
    'b': {'kernel': random.standard_normal((17, 9)).astype(np.float32)},
  }


def _method(**choices):
  return projection.SubsetProjection(
    0.01, epsilon_start=0.5, epsilon_steps=10, **choices
  )


@pytest.mark.parametrize('shape', ['linear', 'cosine', 'cubic'])
def test_every_silo_s_budget_is_exact_at_every_step(shape):
  seed = _seed()
  method = _method(epsilon_schedule=shape)
  layout = method.layout(seed)
  program = method.prepare(seed)
  step = jax.jit(lambda p, tuning, seed, i: p.settle(tuning, seed, i))
  state, random = method.init(seed), np.random.default_rng(1)
  sizes = []
  for i in range(14):
    new = jax.tree.map(
      lambda x: x + random.standard_normal(x.shape).astype(np.float32), seed
    )
    after = step(program, api.Tuning(new, (), state), seed, jnp.int32(i))
    state = after.state
    free = [
      int(np.sum(np.asarray(a) != b))
      for a, b in zip(
        jax.tree.leaves(after.params), jax.tree.leaves(seed), strict=True
      )
    ]
    assert free == layout.budgets(method.schedule.epsilon(i + 1))
    sizes.append(sum(free))
  assert step._cache_size() == 1
  assert sizes == sorted(sizes, reverse=True)
  assert sizes[9:] == [method.free(seed)] * 5 < sizes[:5]
  assert sizes[0] < method.free_at_most(seed) == round(0.5 * layout.size)


def test_the_shapes_are_those_of_gradual_pruning():
  def epsilon(shape, step):
    return schedules.Schedule(shape, 0.1, 0.9, 100).epsilon(step)

  for step in (1, 40, 99):
    x = step / 100
    assert epsilon('linear', step) == pytest.approx(0.9 - 0.8 * x)
    assert epsilon('cubic', step) == pytest.approx(0.1 + 0.8 * (1 - x) ** 3)
    half = (1 + math.cos(math.pi * x)) / 2
    assert epsilon('cosine', step) == pytest.approx(0.1 + 0.8 * half)
  assert epsilon('linear', 100) == epsilon('cubic', 1000) == 0.1


@pytest.mark.parametrize('steps', [1, 999, 1000, 1001, 12_345, 10**7])
def test_a_table_stays_small_and_ends_at_the_end(steps):
  schedule = schedules.Schedule('cubic', 0.01, 1.0, steps)
  layout = silos.make_layout(_seed())
  table = schedule.table(layout)
  assert len(table) <= 1001
  for step in (0, steps // 2, steps - 1, steps, 2 * steps):
    row = schedule.look_up(table, jnp.int32(step))
    wanted = layout.budgets(schedule.epsilon(step + 1))
    np.testing.assert_array_equal(np.asarray(row)[:, 1], wanted)
  assert schedule.epsilon(steps) == 0.01


def test_a_constant_schedule_changes_nothing():
  plain = projection.SubsetProjection(0.01)
  constant = projection.SubsetProjection(
    0.01, epsilon_schedule='constant', epsilon_start=0.5, epsilon_steps=7
  )
  assert plain.settings() == constant.settings()
  assert 'epsilon_steps' not in plain.settings()
  assert _method(epsilon_schedule='linear').settings()['epsilon_steps'] == 10


@pytest.mark.parametrize(
  ('choices', 'says'),
  [
    ({'epsilon_steps': 10}, 'needs EPSILON_START'),
    ({'epsilon_start': 0.5}, 'needs EPSILON_START'),
    ({'epsilon_start': 0.001, 'epsilon_steps': 10}, 'is below EPSILON = 0.01'),
    (
      {'epsilon_start': 1.0, 'epsilon_steps': 5, 'threshold': 'sort'},
      "needs THRESHOLD = 'exact'",
    ),
    (
      {'epsilon_start': 1.0, 'epsilon_steps': 5, 'keep_seed': False},
      'KEEP_SEED = True',
    ),
  ],
)
def test_a_wrong_schedule_is_refused(choices, says):
  with pytest.raises(UserError, match=says):
    projection.SubsetProjection(0.01, epsilon_schedule='cubic', **choices)


def test_a_loop_must_pass_the_step():
  seed = _seed()
  method = _method(epsilon_schedule='linear')
  with pytest.raises(UserError, match='needs the step'):
    method.apply(seed, seed, method.init(seed))
