"""Subsets applied and reverted in place, on one device and on many."""

import re

import commands
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import subsets

from dst_t5x import subsets as subset
from dst_t5x.core import errors
from dst_t5x.core import stacking
from dst_t5x.subsets import fingerprint
from dst_t5x.subsets import on_device


def _seed(dtype=np.float32):
  random = np.random.default_rng(0)

  def tensor(*shape):
    return random.standard_normal(shape).astype(dtype)

  layers = {f'layers_{i}': {'w': tensor(20, 30), 'norm': {'scale': tensor(20)}}
            for i in range(3)}  # fmt: skip
  return {
    'encoder': layers,
    'embedding': tensor(50, 16),
    'cube': tensor(6, 5, 7),
    'scale': tensor(),
  }


def _on_devices(tree):
  # A copy: on the CPU, JAX may share memory with a host array.
  return jax.tree.map(jnp.array, tree)


@pytest.mark.parametrize('dtype', [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize('form', [lambda x: x, stacking.stack_layers])
def test_there_and_back(dtype, form):
  random = np.random.default_rng(1)
  seed = _seed(dtype)
  params = _on_devices(form(seed))
  for share in (0.02, 0.1, 0.5, 0.0):
    found, tuned = subsets.random_subset(seed, share, random)
    patch = subset.Slots(params, found.fingerprint, 99).place(found)
    params, undo = subset.apply_in_place(params, patch)
    subsets.assert_same(params, form(tuned))
    params = subset.revert(params, undo)
    subsets.assert_same(params, form(seed))


def test_several_types():
  seed = {'a': np.zeros(9, ml_dtypes.bfloat16), 'b': np.zeros(9, np.float32),
          'c': np.zeros(4, ml_dtypes.bfloat16)}  # fmt: skip
  found, tuned = subsets.random_subset(seed, 0.5, np.random.default_rng(0))
  params = _on_devices(seed)
  patch = subset.Slots(params, found.fingerprint, 99).place(found)
  params, undo = subset.apply_in_place(params, patch)
  subsets.assert_same(params, tuned)
  subsets.assert_same(subset.revert(params, undo), seed)


def test_parameters_stay_where_they_are():
  seed = _seed()
  found, _ = subsets.random_subset(seed, 0.1, np.random.default_rng(0))
  params = _on_devices(seed)
  before = jax.tree.leaves(params)
  places = [leaf.unsafe_buffer_pointer() for leaf in before]
  patch = subset.Slots(params, found.fingerprint, 99).place(found)
  params, undo = subset.apply_in_place(params, patch)
  assert all(leaf.is_deleted() for leaf in before)
  params = subset.revert(params, undo)
  leaves = jax.tree.leaves(params)
  assert places == [leaf.unsafe_buffer_pointer() for leaf in leaves]
  exchange = on_device._compiled(
    tuple(leaf.sharding for leaf in leaves), patch.rooms
  )
  program = exchange.lower(leaves, *patch.rounds[0]).compile()
  copied = re.findall(r'= (\S+) copy\(', program.as_text())
  assert set(copied) <= {'f32[]'}  # Of a scalar it costs nothing.
  assert program.memory_analysis().temp_size_in_bytes < 2**16


@pytest.fixture
def compilations():
  """The durations of all compilations in this test."""
  durations = []

  def listen(event, duration, **_):
    if event == '/jax/core/compile/backend_compile_duration':
      durations.append(duration)

  jax.monitoring.register_event_duration_secs_listener(listen)
  yield durations
  jax.monitoring.unregister_event_duration_listener(listen)


def test_nothing_is_compiled_for_another_subset(compilations):
  random = np.random.default_rng(2)
  seed = _seed()
  identity = fingerprint.fingerprint(seed)
  # Neither with parameters that JAX may move, nor with others.
  for params in (_on_devices(seed), jax.device_put(seed, jax.devices()[0])):
    params = jax.tree.map(jnp.copy, params)
    for i, share in enumerate((0.05, 0.01, 0.1, 0.07, 0.0)):
      found, _ = subsets.random_subset(seed, share, random)
      patch = subset.Slots(params, identity, 300).place(found)
      params, undo = subset.apply_in_place(params, patch)
      params = subset.revert(params, undo)
      # A patch is good for several times.
      params, undo = subset.apply_in_place(params, patch)
      params = subset.revert(params, undo)
      if not i:
        assert compilations
        compilations.clear()
    assert not compilations
  subsets.assert_same(params, seed)


def test_what_finds_no_room_waits_for_another_round(compilations):
  seed = _seed()
  tuned = jax.tree.map(np.copy, seed)
  tuned['encoder']['layers_1']['norm']['scale'] += 1  # All of a small tensor.
  tuned['cube'][2] = 0
  found = subset.extract(tuned, seed)
  params = _on_devices(seed)
  patch = subset.Slots(params, 'f' * 64, 1).place(found)
  assert len(patch.rounds) > 3
  compilations.clear()
  params, undo = subset.apply_in_place(params, patch)
  subsets.assert_same(params, tuned)
  params = subset.revert(params, undo)
  # No more programs than for one round, and none if there was one like it.
  assert len(compilations) <= 1
  subsets.assert_same(params, seed)


def test_one_on_another():
  random = np.random.default_rng(3)
  seed = _seed()
  first, tuned = subsets.random_subset(seed, 0.3, random)
  second, _ = subsets.random_subset(seed, 0.3, random)
  params = _on_devices(seed)
  undos = []
  for found in (first, second):
    patch = subset.Slots(params, found.fingerprint, 99).place(found)
    params, undo = subset.apply_in_place(params, patch)
    undos.append(undo)
  both = subset.combine([second, first], 'priority').subset
  subsets.assert_same(params, subset.apply(both, seed))
  params = subset.revert(params, undos.pop())
  subsets.assert_same(params, tuned)
  params = subset.revert(params, undos.pop())
  subsets.assert_same(params, seed)


def test_shapes_are_enough_to_place():
  seed = _seed()
  found, tuned = subsets.random_subset(seed, 0.1, np.random.default_rng(0))
  params = _on_devices(seed)
  shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
    params,
  )
  patch = subset.Slots(shapes, found.fingerprint, 99).place(found)
  params, _ = subset.apply_in_place(params, patch)
  subsets.assert_same(params, tuned)


def test_what_cannot_be_placed():
  seed = _seed()
  found, _ = subsets.random_subset(seed, 0.1, np.random.default_rng(0))
  params = _on_devices(seed)
  fewer = {name: x for name, x in params.items() if name != 'cube'}
  for tree, identity, message in (
    (params, 'f' * 64, 'it belongs to the seed with fingerprint'),
    (fewer, found.fingerprint, 'the subset has a tensor cube, the model has n'),
    (seed, found.fingerprint, 'these parameters are not on the devices'),
  ):
    with pytest.raises(errors.UserError, match=message):
      subset.Slots(tree, identity, 99).place(found)


@pytest.fixture(scope='module')
def rows():
  """Kind of axes -> what `apply_sharded.py` found."""
  found = commands.rows_on_eight_devices('apply_sharded.py')
  return {row['axes']: row for row in found}


@pytest.mark.parametrize('axes', ['Auto', 'Explicit'])
def test_sharded_parameters(rows, axes):
  row = rows[axes]
  assert row['is_equal']
  assert row['is_there']
  # Only the values that are kept for `revert` travel, no tensor.
  assert {operation for _, operation in row['sent']} == {'all-reduce'}
  lengths = [int(s.removeprefix('f32[')[:-1]) for s, _ in row['sent']]
  assert max(lengths) < 300
