"""Lists that are chosen anew, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dst_t5x.core.errors import UserError
from dst_t5x.method import api
from dst_t5x.method import reselecting

_SHAPES = {'a': {'kernel': (12, 15)}, 'b': {'kernel': (9, 11)}}


def _tree(random):
  return jax.tree.map(
    lambda shape: random.standard_normal(shape).astype(np.float32),
    _SHAPES,
    is_leaf=lambda x: isinstance(x, tuple),
  )


def _low_rank(x, rank):
  u, s, v = np.linalg.svd(x, full_matrices=False)
  return (u[:, :rank] * s[:rank]) @ v[:rank]


_SCORES = {
  'gasdu': (reselecting.Gasdu, {}, lambda p, g: np.abs(g)),
  'nano_adam': (reselecting.NanoAdam, {}, lambda p, g: -np.abs(p)),
  'lift': (
    reselecting.Lift,
    {'rank': 2},
    lambda p, g: np.abs(_low_rank(p, 2)),
  ),
}


@pytest.mark.parametrize('name', _SCORES)
@pytest.mark.parametrize('shape', ['constant', 'cubic'])
def test_the_highest_are_chosen_at_each_interval(name, shape):
  make, settings, score = _SCORES[name]
  method = make(
    0.1,
    interval=2,
    epsilon_schedule=shape,
    epsilon_start=0.4,
    epsilon_steps=6,
    **settings,
  )
  random = np.random.default_rng(0)
  seed = jax.tree.map(jnp.asarray, _tree(random))
  layout, frame = method.layout(seed), method.frame(seed)
  choose = jax.jit(method.choose)
  tuning = api.Tuning(seed, (), method.init(seed))
  wanted = None
  for step in range(9):
    gradients = _tree(random)
    chosen = choose(tuning, gradients, seed, jnp.int32(step))
    if step % 2 == 0:
      budgets = layout.budgets(method.schedule.epsilon(step + 1))
      wanted = [
        score(p, g) >= np.sort(score(p, g), axis=None)[-n]
        for p, g, n in zip(
          jax.tree.leaves(tuning.params),
          jax.tree.leaves(gradients),
          budgets,
          strict=True,
        )
      ]
      assert [w.sum() for w in wanted] == budgets
    masks = jax.tree.leaves(frame.masks(chosen.state.entries, seed))
    for mask, chosen_mask in zip(masks, wanted, strict=True):
      np.testing.assert_array_equal(mask, chosen_mask)
    # What is tuned changes, and what leaves stays as it is.
    tuned = method.tuned(chosen.params, chosen.state)
    moved = jax.tree.map(lambda x: 1.5 * x, tuned)
    params = method.put(chosen.params, moved, chosen.state)
    for new, old, mask in zip(
      *map(jax.tree.leaves, (params, tuning.params)), masks, strict=True
    ):
      np.testing.assert_array_equal(np.asarray(new) != old, mask)
    tuning = chosen._replace(params=params)
  assert choose._cache_size() == 1


def test_a_schedule_without_a_start_is_refused():
  with pytest.raises(UserError, match='needs EPSILON_START'):
    reselecting.Gasdu(0.1, epsilon_schedule='linear')
