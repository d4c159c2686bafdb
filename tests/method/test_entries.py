"""Lists of components, against NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dst_t5x.method import entries as entries_lib
from dst_t5x.method import entry_keys
from dst_t5x.method import pieces
from dst_t5x.method import scores
from dst_t5x.method import selection
from dst_t5x.method import silos as silo_lib

_SHAPES = {
  'embedder': {'embedding': (70, 33)},
  'encoder': {
    'layers_0': {
      'mlp': {'wi': (16, 40), 'wo': (40, 16)},
      'norm': {'scale': (16,)},
    },
    'layers_1': {'mlp': {'wi': (16, 40), 'wo': (40, 16)}},
  },
  'decoder': {'layers': {'mlp': {'wi': (3, 16, 31)}, 'gate': (3,)}},
  'temperature': (),
}


def _tree(random):
  return jax.tree.map(
    lambda shape: random.standard_normal(shape).astype(np.float32),
    _SHAPES,
    is_leaf=lambda x: isinstance(x, tuple),
  )


def _flat(tree, layout):
  """Returns silo -> the components in the order of positions in the silo."""
  stretches = {}
  for leaf, tensor in zip(layout.leaves, jax.tree.leaves(tree), strict=True):
    rows = np.asarray(tensor).reshape(len(leaf.silos), -1)
    for silo, offset, row in zip(leaf.silos, leaf.offsets, rows, strict=True):
      stretches.setdefault(silo, []).append((offset, row))
  return {
    silo: np.concatenate([row for _, row in sorted(parts, key=lambda x: x[0])])
    for silo, parts in stretches.items()
  }


def _list(masks, tree, layout, rooms):
  """Returns the list's values, room by room; 0 where unused."""
  chosen, values = _flat(masks, layout), _flat(tree, layout)
  found = []
  for silo, room in enumerate(rooms):
    of_silo = values[silo][chosen[silo]]
    found.append(np.pad(of_silo, (0, room - len(of_silo))))
  return np.concatenate(found)


@pytest.fixture(params=['none', 'per_module_and_layer', 'per_tensor'])
def layout(request):
  shapes = jax.eval_shape(lambda: _tree(np.random.default_rng(0)))
  return silo_lib.make_layout(shapes, request.param)


def _masks(tree, layout, rooms, most):
  """Returns masks that fill the rooms up to a share."""
  budgets = [int(most * room) for room in rooms]
  return selection.choose(layout, scores.largest, tree, tree, budgets)


@pytest.fixture
def frame(layout, monkeypatch):
  monkeypatch.setattr(pieces, 'MOST', 32)  # Several pieces a tensor.
  shapes = jax.eval_shape(lambda: _tree(np.random.default_rng(0)))
  return entries_lib.frame(layout, shapes, layout.budgets(0.3))


@pytest.mark.parametrize('most', [0.0, 0.7, 1.0])
def test_a_list_has_the_components_of_its_masks(layout, frame, most):
  random = np.random.default_rng(1)
  tree, other = _tree(random), _tree(random)
  masks = _masks(tree, layout, frame.rooms, most)
  listed = jax.jit(frame.of_masks)(masks)
  wanted = _list(masks, other, layout, frame.rooms)
  np.testing.assert_array_equal(jax.jit(frame.gather)(other, listed), wanted)
  again = frame.masks(listed, tree)
  assert jax.tree.all(jax.tree.map(np.array_equal, again, masks))
  assert frame.is_used(listed).sum() == sum(int(most * n) for n in frame.rooms)


def test_scatter_changes_the_listed_components_only(layout, frame):
  random = np.random.default_rng(2)
  tree, new = _tree(random), _tree(random)
  masks = _masks(tree, layout, frame.rooms, 0.8)
  listed = frame.of_masks(masks)
  result = jax.jit(frame.scatter)(tree, listed, frame.gather(new, listed))
  wanted = jax.tree.map(np.where, masks, new, tree)
  assert jax.tree.all(jax.tree.map(np.array_equal, result, wanted))


def test_the_list_is_the_same_for_stacked_layers():
  random = np.random.default_rng(3)
  stacked = {'s': {'layers': {'w': random.standard_normal((3, 8, 5))}}}
  apart = {
    's': {
      f'layers_{i}': {'w': stacked['s']['layers']['w'][i]} for i in range(3)
    }
  }
  found = []
  for tree in (stacked, apart):
    layout = silo_lib.make_layout(tree, 'none')
    budgets = layout.budgets(0.2)
    masks = selection.choose(layout, scores.smallest, tree, tree, budgets)
    frame = entries_lib.frame(layout, tree, budgets)
    listed = frame.of_masks(masks)
    found.append((listed.positions, frame.gather(tree, listed)))
  for a, b in zip(*found, strict=True):
    np.testing.assert_array_equal(a, b)


def test_an_optimizer_s_state_follows_its_components(layout, frame):
  random = np.random.default_rng(4)
  tree, other, moments = _tree(random), _tree(random), _tree(random)
  before, after = (
    frame.of_masks(_masks(x, layout, frame.rooms, 0.9)) for x in (tree, other)
  )
  state = {
    'moments': frame.split(frame.gather(moments, before)),
    'count': jnp.int32(7),
  }
  carried = jax.jit(functools.partial(entry_keys.carried, frame))(
    state, before, after
  )
  # Zero where the first list has no such component.
  stays = frame.masks(before, tree)
  kept = jax.tree.map(lambda mask, x: np.where(mask, x, 0), stays, moments)
  np.testing.assert_array_equal(
    frame.join(carried['moments']), frame.gather(kept, after)
  )
  assert carried['count'] == 7


@pytest.mark.parametrize(
  'name', ['largest', 'smallest', 'product', 'difference']
)
def test_the_highest_scores_are_chosen(name):
  random = np.random.default_rng(5)
  x, y = (
    {'a': random.standard_normal((20, 30)).astype(np.float32)} for _ in range(2)
  )
  layout = silo_lib.make_layout(x, 'none')
  score = {
    'largest': np.abs(x['a']),
    'smallest': -np.abs(x['a']),
    'product': np.abs(x['a'] * y['a']),
    'difference': np.abs(x['a'] - y['a']),
  }[name]
  masks = selection.choose(layout, getattr(scores, name), x, y, [17])
  wanted = score >= np.sort(score.ravel())[-17]
  np.testing.assert_array_equal(masks['a'], wanted)
