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
    layout = subset.Layout(params, found.fingerprint)
    placed = layout.place(found, params)
    params = layout.write(params, placed, tuned=True)
    subsets.assert_same(params, form(tuned))
    params = layout.write(params, placed, tuned=False)
    subsets.assert_same(params, form(seed))


def test_several_types():
  seed = {'a': np.zeros(9, ml_dtypes.bfloat16), 'b': np.zeros(9, np.float32),
          'c': np.zeros(4, ml_dtypes.bfloat16)}  # fmt: skip
  found, tuned = subsets.random_subset(seed, 0.5, np.random.default_rng(0))
  params = _on_devices(seed)
  layout = subset.Layout(params, found.fingerprint)
  placed = layout.place(found, params)
  params = layout.write(params, placed, tuned=True)
  subsets.assert_same(params, tuned)
  params = layout.write(params, placed, tuned=False)
  subsets.assert_same(params, seed)


def test_parameters_stay_where_they_are():
  seed = _seed()
  found, _ = subsets.random_subset(seed, 0.1, np.random.default_rng(0))
  params = _on_devices(seed)
  before = jax.tree.leaves(params)
  places = [leaf.unsafe_buffer_pointer() for leaf in before]
  layout = subset.Layout(params, found.fingerprint)
  placed = layout.place(found, params)
  params = layout.write(params, placed, tuned=True)
  assert all(leaf.is_deleted() for leaf in before)
  params = layout.write(params, placed, tuned=False)
  leaves = jax.tree.leaves(params)
  assert places == [leaf.unsafe_buffer_pointer() for leaf in leaves]
  write = layout._compiled(placed.capacity, placed.slack).write
  program = write.lower(leaves, [placed.arrays], 0).compile()
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
      layout = subset.Layout(params, identity)
      placed = layout.place(found, params)
      # What is placed can be written several times.
      for tuned in (True, False, True, False):
        params = layout.write(params, placed, tuned=tuned)
      if not i:
        assert compilations
        compilations.clear()
    assert not compilations
  subsets.assert_same(params, seed)


def test_what_finds_no_room_waits_for_another_round(compilations, monkeypatch):
  monkeypatch.setattr(on_device, 'LEAST_CAPACITY', 1)
  monkeypatch.setattr(
    subset.Layout, 'rooms', lambda self, *_: tuple(3 for _ in self.sizes)
  )
  seed = _seed()
  tuned = jax.tree.map(np.copy, seed)
  tuned['encoder']['layers_1']['norm']['scale'] += 1  # All of a small tensor.
  tuned['cube'][2] = 0
  found = subset.extract(tuned, seed)
  params = _on_devices(seed)
  layout = subset.Layout(params, 'f' * 64)
  placed = layout.place(found, params)
  assert placed.rounds > 3
  compilations.clear()
  params = layout.write(params, placed, tuned=True)
  subsets.assert_same(params, tuned)
  params = layout.write(params, placed, tuned=False)
  # No more programs than for one round, and none if there was one like it.
  assert len(compilations) <= 1
  subsets.assert_same(params, seed)


def test_one_on_another():
  random = np.random.default_rng(3)
  seed = _seed()
  first, tuned = subsets.random_subset(seed, 0.3, random)
  second, _ = subsets.random_subset(seed, 0.3, random)
  params = _on_devices(seed)
  layout = subset.Layout(params, first.fingerprint)
  placed = []
  for found in (first, second):
    placed.append(layout.place(found, params))
    params = layout.write(params, placed[-1], tuned=True)
  both = subset.combine([second, first], 'priority').subset
  subsets.assert_same(params, subset.apply(both, seed))
  params = layout.write(params, placed.pop(), tuned=False)
  subsets.assert_same(params, tuned)
  params = layout.write(params, placed.pop(), tuned=False)
  subsets.assert_same(params, seed)


def test_shapes_are_enough_for_a_layout():
  seed = _seed()
  found, tuned = subsets.random_subset(seed, 0.1, np.random.default_rng(0))
  params = _on_devices(seed)
  shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
    params,
  )
  layout = subset.Layout(shapes, found.fingerprint)
  placed = layout.place(found, params)
  subsets.assert_same(layout.write(params, placed, tuned=True), tuned)


def test_one_for_another():
  """Subsets of one class in one call, of several classes in two."""
  random = np.random.default_rng(4)
  seed = {'w': random.standard_normal((40, 50), np.float32)}
  params = _on_devices(seed)
  layout = subset.Layout(params, fingerprint.fingerprint(seed))
  old = layout.place(subset.extract(seed, seed), params)
  classes = set()
  for share in (0.1, 0.2, 0.9, 0.1):
    found, tuned = subsets.random_subset(seed, share, random)
    # Placed from the seed, not from what is in the parameters now.
    new = layout.place(found, _on_devices(seed))
    params = layout.swap(params, old, new)
    subsets.assert_same(params, tuned)
    classes.add((new.capacity, new.slack))
    old = new
  assert len(classes) == 2
  subsets.assert_same(layout.write(params, old, tuned=False), seed)


def test_bits_of_any_value_come_back():
  seed = {
    name: np.arange(2**16, dtype=np.uint16).view(dtype)
    for name, dtype in (('a', np.float16), ('b', ml_dtypes.bfloat16))
  }
  # XLA for CPUs makes one NaN of them all.
  with np.errstate(invalid='ignore'):
    seed = {name: x[~np.isnan(x)] for name, x in seed.items()}
  tuned = {name: x[::-1].copy() for name, x in seed.items()}
  found = subset.extract(tuned, seed)
  params = _on_devices(seed)
  layout = subset.Layout(params, 'f' * 64)
  placed = layout.place(found, params)
  params = layout.write(params, placed, tuned=True)
  subsets.assert_same(params, tuned)
  subsets.assert_same(layout.write(params, placed, tuned=False), seed)


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
      subset.Layout(tree, identity).place(found, tree)


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
  assert row['sent_by_write'] == []
  # Only the values that are kept for the way back travel, no tensor.
  assert {operation for _, operation in row['sent_by_read']} == {'all-reduce'}
  lengths = [int(s.partition('[')[2][:-1]) for s, _ in row['sent_by_read']]
  assert max(lengths) <= row['largest_room'] < row['largest_tensor']
