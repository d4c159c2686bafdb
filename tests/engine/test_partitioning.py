"""The mesh and its shardings, from T5X's logical axis names."""

import dataclasses
import subprocess
import sys

import commands
import jax
import numpy as np
import optax
import pytest
import tiny_t5

from dst_t5x.core.errors import UserError
from dst_t5x.engine import optimizers
from dst_t5x.engine import parameters
from dst_t5x.engine import partitioning
from dst_t5x.method import projection
from dst_t5x.models.t5 import network


def test_one_device_is_a_mesh_too():
  partitioner = partitioning.Partitioner()
  assert dict(partitioner.mesh.shape) == {'data': 1, 'fsdp': 1, 'model': 1}
  with partitioner.activate():
    space = parameters.ParameterSpace(
      network.Transformer(tiny_t5.CONFIG), partitioner
    )
  assert jax.tree.structure(space.shapes) == jax.tree.structure(space.shardings)
  placed = partitioner.place_batch({'x': np.ones((4, 3), np.int32)})
  assert placed['x'].sharding.spec == jax.sharding.PartitionSpec(
    ('data', 'fsdp')
  )


def test_devices_that_cannot_be_divided():
  for groups in (2, 0, -1):
    with pytest.raises(UserError, match=f'model_parallelism = {groups}'):
      partitioning.Partitioner(groups)


def _by_rank(params):
  return jax.tree.map(lambda leaf: 'adam' if leaf.ndim > 1 else 'sgd', params)


def _labels(params):
  """Returns stand-ins for shardings: the paths of the parameters."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: jax.tree_util.keystr(path), params
  )


@pytest.mark.parametrize(
  'make',
  [
    optax.adam,
    lambda rate: optax.sgd(rate, momentum=0.9),
    lambda rate: optax.chain(optax.clip(1.0), optax.adamw(rate)),
    lambda rate: optax.partition(
      {'adam': optax.adam(rate), 'sgd': optax.sgd(rate, 0.9)}, _by_rank
    ),
  ],
  ids=['adam', 'momentum', 'chain', 'partition'],
)
def test_state_is_sharded_as_optax_maps_it(make):
  partitioner = partitioning.Partitioner()
  params = tiny_t5.shapes()
  optimizer = optimizers.Optimizer(make, lambda step: 0.1)
  state = jax.eval_shape(optimizer.init, params)
  expected = optax.tree_map_params(
    make(0.1),
    lambda node, label: node if isinstance(node, optax.MaskedNode) else label,
    state,
    _labels(params),
    transform_non_params=lambda _: partitioner.replicated,
    is_leaf=lambda node: isinstance(node, optax.MaskedNode),
  )
  labels = partitioner.like_parameters(state, params, _labels(params))
  assert labels == expected
  assert set(jax.tree.leaves(_labels(params))) <= set(jax.tree.leaves(labels))


@pytest.mark.parametrize('scan', [False, True])
def test_factored_moments_are_replicated_and_others_are_not(scan):
  partitioner = partitioning.Partitioner()
  config = dataclasses.replace(tiny_t5.CONFIG, scan_layers=scan)
  params = tiny_t5.shapes(config)
  optimizer = optimizers.adafactor(
    lambda step: 0.1, min_dim_size_to_factor=20, momentum=0.9
  )
  state = jax.eval_shape(optimizer.init, params)
  labels = partitioner.like_parameters(state, params, _labels(params))
  sharded = [leaf for leaf in jax.tree.leaves(labels) if isinstance(leaf, str)]
  of_factored = "['token_embedder']['embedding']"  # [48, 8] is not factored.
  assert sharded.count(of_factored) == 2
  # The first moment of each parameter, and each unfactored second moment.
  names = jax.tree.leaves(_labels(params))
  assert set(sharded) == set(names)
  assert len(names) < len(sharded) <= 2 * len(names)


@pytest.mark.parametrize('scan', [False, True])
def test_the_masks_of_a_subset_without_churn_are_sharded(scan):
  partitioner = partitioning.Partitioner()
  config = dataclasses.replace(tiny_t5.CONFIG, scan_layers=scan)
  space = parameters.ParameterSpace(network.Transformer(config), partitioner)
  method = projection.SubsetProjection(0.1, churn=False)
  state = jax.eval_shape(method.init, space.shapes)
  shardings = partitioner.like_parameters(state, space.shapes, space.shardings)
  masks, is_chosen = shardings.chosen
  assert is_chosen == shardings.passes == partitioner.replicated
  for mask, parameter in zip(
    jax.tree.leaves(masks), jax.tree.leaves(space.shardings), strict=True
  ):
    assert mask.spec == parameter.spec


def test_the_longest_path_names_the_parameter():
  partitioner = partitioning.Partitioner()
  leaf = jax.ShapeDtypeStruct((4, 2), np.float32)
  params = {'embedding': leaf, 'encoder': {'embedding': leaf}}
  state = jax.eval_shape(optax.adam(0.1).init, params)
  labels = partitioner.like_parameters(state, params, _labels(params))
  assert labels[0].mu == _labels(params)


_EIGHT_DEVICES = """
import jax, numpy as np
from dst_t5x import subsets
from dst_t5x.core import stacking
from dst_t5x.core.errors import UserError
from dst_t5x.engine import optimizers, parameters, partitioning, trainer
from dst_t5x.method import projection
from dst_t5x.models.t5 import network
import jax.numpy as jnp
import tiny_t5, dataclasses

P = jax.sharding.PartitionSpec
# What is left open depends on the model's size alone: 16 GiB each are assumed.
def fitted(parameters, *known, bytes_each=partitioning.IN_TRAINING):
  return str(partitioning.Partitioner(*known).fitted(parameters, bytes_each))
assert fitted(77e6) == 'data 8 × fsdp 1 × model 1'
assert fitted(3e9) == 'data 1 × fsdp 1 × model 8'
assert fitted(3e9, None, 2) == 'data 1 × fsdp 2 × model 4'
assert fitted(3e9, 2) == 'data 1 × fsdp 4 × model 2'
assert fitted(3e9, 1, 1) == 'data 8 × fsdp 1 × model 1'
assert fitted(3e9, bytes_each=partitioning.IN_EVALUATION) == (
  'data 4 × fsdp 1 × model 2'
)
assert fitted(11e9) == 'data 1 × fsdp 1 × model 8'
try:
  partitioning.Partitioner(4, 4)
  raise AssertionError
except UserError as e:
  assert 'model_parallelism · fsdp = 4 · 4' in str(e), e
# Rows of a whole batch, divided by both axes.
both = partitioning.Partitioner(2, 2)
assert both.rows_here(8).all()
placed = both.place_batch({'x': np.arange(16).reshape(8, 2)})['x']
assert {s.data.shape for s in placed.addressable_shards} == {(2, 2)}
# Six heads cannot be divided by four, but what is large can be.
six = dataclasses.replace(tiny_t5.CONFIG, num_heads=6)
space = parameters.ParameterSpace(
  network.Transformer(six), partitioning.Partitioner(4, 2)
)
encoder = space.shardings['encoder']
assert encoder['relpos_bias']['rel_embedding'].spec == P(None, None)
assert encoder['layers_0']['mlp']['wo']['kernel'].spec == P('model', 'fsdp')
partitioner = partitioning.Partitioner(2)
assert dict(partitioner.mesh.shape) == {'data': 4, 'fsdp': 1, 'model': 2}
try:
  partitioner.check_batch_size(6)
  raise AssertionError
except UserError as e:
  assert str(e) == (
    'BATCH_SIZE = 6 is not a multiple of the 4 groups of devices that split it'
    '; with MODEL_PARALLELISM = 4 it would be'
  ), e
partitioner.check_batch_size(8)
config = dataclasses.replace(
  tiny_t5.CONFIG, num_encoder_layers=2, num_decoder_layers=1, scan_layers=SCAN
)
with partitioner.activate():
  space = parameters.ParameterSpace(network.Transformer(config), partitioner)
  lead = (None,) if SCAN else ()
  layer = space.shardings['encoder']['layers' if SCAN else 'layers_0']
  assert layer['attention']['query']['kernel'].spec == P(*lead, 'fsdp', 'model')
  assert layer['mlp']['wo']['kernel'].spec == P(*lead, 'model', 'fsdp'), layer
  embedding = space.shardings['token_embedder']['embedding']
  assert embedding.spec == P('model', 'fsdp'), embedding
  host = tiny_t5.random_params(dataclasses.replace(config, scan_layers=False))
  params = space.to_devices(host)
  kernel = params['token_embedder']['embedding']
  assert {s.data.shape for s in kernel.addressable_shards} == {(24, 8)}
  back = stacking.unstack_layers(jax.device_get(params))
  jax.tree.map(np.testing.assert_array_equal, back, host)
  # Masks too, but for axes that cannot be divided once they are packed.
  subset = projection.SubsetProjection(0.1, churn=False)
  masks = jax.eval_shape(subset.init, space.shapes)
  specs = jax.tree.map(
    lambda sharding: sharding.spec,
    partitioner.like_parameters(masks, space.shapes, space.shardings).chosen[0],
  )
  assert specs['token_embedder']['embedding'] == P('model', 'fsdp')
  kernel = specs['encoder']['layers' if SCAN else 'layers_0']['mlp']['wi_0']
  packed = masks.chosen[0]['encoder']['layers' if SCAN else 'layers_0']['mlp']
  width = packed['wi_0']['kernel'].shape[-1]
  last = None if width % 2 else 'model'
  assert kernel['kernel'] == P(*lead, 'fsdp', last), (kernel, width)
  # What differs from the seed is found where it lies, by whoever has it.
  tuned = jax.jit(
    lambda tree: jax.tree.map(lambda x: jnp.where(x > 1.5, x + 1, x), tree),
    out_shardings=space.shardings,
  )(params)
  here = subsets.merge([subsets.extract_here(tuned, host)])
  assert subsets.to_arrays(here)['subset'].tobytes() == subsets.to_arrays(
    subsets.extract(jax.device_get(tuned), host)
  )['subset'].tobytes()
  assert here.size > 100
  # The optimizer's unfactored moments lie where the parameters do.
  t = trainer.Trainer(
    network.Transformer(config),
    optimizers.adafactor(lambda step: 0.1),
    projection.NoProjection(),
  )
  abstract = jax.eval_shape(t.init, space.shapes)
  shardings = partitioner.like_parameters(
    abstract, space.shapes, space.shardings
  )
  pairs = zip(
    jax.tree.leaves(abstract.opt_state), jax.tree.leaves(shardings.opt_state)
  )
  specs = {leaf.shape: sharding.spec for leaf, sharding in pairs}
  assert specs[48, 8] == P('model', 'fsdp'), specs
  assert specs[()] == P()
print('fine')
"""


@pytest.mark.parametrize('scan', [False, True])
def test_eight_devices(repository, monkeypatch, scan):
  monkeypatch.setenv(
    'XLA_FLAGS', commands.xla_flags('--xla_force_host_platform_device_count=8')
  )
  monkeypatch.setenv('PYTHONPATH', f'{repository}:{repository / "tests"}')
  found = subprocess.run(
    [sys.executable, '-c', _EIGHT_DEVICES.replace('SCAN', str(scan))],
    capture_output=True,
    text=True,
    timeout=200,
  )
  assert found.stdout == 'fine\n', found.stderr
