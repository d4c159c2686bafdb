"""SpIEL, against a short NumPy reference written from the paper."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dst_t5x.core.errors import UserError
from dst_t5x.method import api
from dst_t5x.method import spiel

_INTERVAL, _ACCUMULATE, _STEPS = 6, 2, 24
_SHARE = 0.4
_RATE = 0.125
# The last window ends after step 20.
_SHRINKING = {
  'epsilon_schedule': 'linear',
  'epsilon_start': 0.25,
  'epsilon_steps': 20,
}
_SHAPES = {
  'embedder': (9, 33),
  'encoder': {'layers': {'mlp': {'wi': (3, 16, 5)}}},
  'norm': (7,),
}


def _tree(random):
  return jax.tree.map(
    lambda shape: random.standard_normal(shape).astype(np.float32),
    _SHAPES,
    is_leaf=lambda x: isinstance(x, tuple),
  )


def _method(**settings):
  return spiel.Spiel(
    **{
      'epsilon': 0.1,
      'interval': _INTERVAL,
      'accumulate': _ACCUMULATE,
      'share': _SHARE,
      'steps': _STEPS,
    }
    | settings
  )


def _flat(tree, layout):
  """Returns the components of each silo, a list of vectors."""
  stretches = [[] for _ in layout.names]
  for leaf, tensor in zip(layout.leaves, jax.tree.leaves(tree), strict=True):
    rows = np.asarray(tensor).reshape(len(leaf.silos), -1)
    for silo, offset, row in zip(leaf.silos, leaf.offsets, rows, strict=True):
      stretches[silo].append((offset, row))
  return [
    np.concatenate([row for _, row in sorted(found, key=lambda x: x[0])])
    for found in stretches
  ]


class _Reference:
  """SpIEL-AG and gradient descent with momentum on one silo."""

  def __init__(self, seed, listed, decay, budget):
    self.seed, self.listed, self.decay = seed, set(listed), decay
    self.budget, self.most = budget, len(listed)
    self.delta = np.zeros_like(seed)
    self.momentum = np.zeros_like(seed)
    self.sums = None

  def step(self, t, gradient):
    """Makes step t, counted from 1."""
    if t == 1 or t % _INTERVAL == 0:
      largest = np.argsort(-np.abs(gradient), kind='stable')[
        : self.most
      ].tolist()
      self.sums = {i: gradient[i] for i in largest}
    elif self.sums is not None:
      self.sums = {i: x + gradient[i] for i, x in self.sums.items()}
    for i in self.listed:
      self.momentum[i] = np.float32(0.5) * self.momentum[i] + gradient[i]
      self.delta[i] -= np.float32(_RATE) * self.momentum[i]
    if t % _INTERVAL == _ACCUMULATE:
      kept = min(self.budget(t), len(self.listed))
      self._replace(int(kept * self._share(t)), len(self.listed) - kept)
      self.sums = None

  def _share(self, t):
    if self.decay == 'cosine':
      return _SHARE * (1 + math.cos(math.pi * t / _STEPS)) / 2
    return 1 if t == _ACCUMULATE else _SHARE * (1 - t / _STEPS)

  def _replace(self, places, surplus):
    drop = sorted(self.listed, key=lambda i: abs(self.delta[i]))
    drop = drop[: places + surplus]
    remain = self.listed - set(drop)
    grow = sorted(self.sums.keys() - remain, key=lambda i: -abs(self.sums[i]))
    grow = grow[:places]
    new = set(grow) - self.listed
    leave = [i for i in drop if i not in grow][: len(new) + surplus]
    self.delta[leave] = 0
    self.momentum[list(new)] = 0
    self.listed = self.listed - set(leave) | new


def _step(method, optimizer):
  """Returns a step: (tuning, target, noise, step) -> tuning, gradients."""

  @jax.jit
  def step(tuning, target, noise, number):
    gradients = jax.tree.map(
      lambda p, t, n: p - t + n, tuning.params, target, noise
    )
    chosen = method.choose(tuning, gradients, (), number)
    before = method.tuned(chosen.params, chosen.state)
    updates, opt_state = optimizer.update(
      method.tuned(gradients, chosen.state), chosen.opt_state, before
    )
    tuned = optax.apply_updates(before, updates)
    params = method.put(chosen.params, tuned, chosen.state)
    after = api.Tuning(params, opt_state, chosen.state)
    return method.settle(after, (), number), gradients

  return step


@pytest.mark.parametrize(
  ('silos', 'decay', 'shrinking'),
  [
    ('none', 'linear', {}),
    ('none', 'linear', _SHRINKING),
    ('per_module_and_layer', 'cosine', {}),
    ('per_module_and_layer', 'cosine', _SHRINKING),
  ],
)
def test_each_step_is_that_of_the_reference(silos, decay, shrinking):
  random = np.random.default_rng(0)
  seed, target = _tree(random), _tree(random)
  method = _method(silos=silos, decay=decay, **shrinking)
  layout, frame = method.layout(seed), method.frame(seed)
  seeds = _flat(seed, layout)
  optimizer = optax.sgd(_RATE, momentum=0.5)
  params, state = jax.tree.map(jnp.asarray, seed), method.init(seed)
  tuning = api.Tuning(
    params, optimizer.init(method.tuned(params, state)), state
  )

  def listed(tuning):
    masks = frame.masks(tuning.state.entries, seed)
    return [np.flatnonzero(mask).tolist() for mask in _flat(masks, layout)]

  def budget(silo, t):
    return layout.budgets(method.schedule.epsilon(t))[silo]

  references = [
    _Reference(s, chosen, decay, functools.partial(budget, i))
    for i, (s, chosen) in enumerate(zip(seeds, listed(tuning), strict=True))
  ]
  sizes = frame.rooms
  step = _step(method, optimizer)
  replaced = 0
  for t in range(1, _STEPS + 2):
    noise = _tree(random)
    before = listed(tuning)
    tuning, gradients = step(tuning, target, noise, jnp.int32(t - 1))
    if t % _INTERVAL == _ACCUMULATE and t <= _STEPS:
      sizes = [budget(silo, t) for silo in range(len(references))]
    now = _flat(tuning.params, layout)
    again = method.seed(tuning.params, (), tuning.state)
    assert jax.tree.all(jax.tree.map(np.array_equal, again, seed))
    for silo, gradient in enumerate(_flat(gradients, layout)):
      reference = references[silo]
      reference.step(t, gradient)
      chosen = listed(tuning)[silo]
      assert len(chosen) == sizes[silo]  # The budget is exact.
      assert set(chosen) == reference.listed
      replaced += len(set(chosen) - set(before[silo]))
      others = np.setdiff1d(np.arange(layout.sizes[silo]), chosen)
      np.testing.assert_array_equal(now[silo][others], seeds[silo][others])
      np.testing.assert_allclose(
        now[silo] - seeds[silo], reference.delta, atol=2e-6
      )
  assert replaced > sum(frame.rooms) / 2
  assert sizes == layout.budgets(0.1)


def test_a_window_whose_first_step_is_refused_begins_later():
  seed = _tree(np.random.default_rng(1))
  method = _method()
  tuning = api.Tuning(seed, (), method.init(seed))
  first = method.choose(tuning, seed, (), jnp.int32(1)).state.extra
  assert first.entries.counts.sum() == method.free(seed)
  none = method.choose(tuning, seed, (), jnp.int32(3)).state.extra
  assert none.entries.counts.sum() == 0


def test_the_state_is_a_few_lists():
  seed = _tree(np.random.default_rng(2))
  method = _method(epsilon=0.01, silos='none')
  sizes = [x.size for x in jax.tree.leaves(method.init(seed))]
  assert max(sizes) <= 5  # 3 tensors, 5 slices, 5 components.


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'steps': None}, 'SPIEL_STEPS'),
    ({'accumulate': _INTERVAL}, 'SPIEL_ACCUMULATE'),
    (_SHRINKING | {'epsilon_steps': 21}, 'set EPSILON_STEPS = 20 or less'),
  ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
  with pytest.raises(UserError, match=message):
    _method(**settings)
