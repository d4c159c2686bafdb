"""The network's parameters: shapes, shardings, and placement on devices."""

from collections.abc import Callable
from typing import Any, NamedTuple

from absl import logging
import jax
import jax.numpy as jnp
import numpy as np

from dst_t5x.adapters import api as adapters
from dst_t5x.checkpoints import matching
from dst_t5x.checkpoints import seeds
from dst_t5x.core import parts
from dst_t5x.core import stacking
from dst_t5x.engine import partitioning
from dst_t5x.models import adapted
from dst_t5x.models import api

PyTree = Any


class ParameterSpace:
  """The shapes and shardings of a network's parameters on a mesh.

  Attributes:
    shapes: tree of `jax.ShapeDtypeStruct`, with the network's structure.
    shardings: tree of shardings.
    base_shapes: the shapes without the adapter's parameters.
  """

  def __init__(
    self, network: api.Network, partitioner: partitioning.Partitioner
  ) -> None:
    """Computes shapes and shardings without allocating parameters."""
    self._network = network
    self._partitioner = partitioner
    variables = api.abstract(network)
    self.shapes = variables['params']
    self.shardings = partitioner.parameters(
      variables['params_axes'], self.shapes
    )
    self.base_shapes = api.shapes(network.base)

  @property
  def size(self) -> int:
    """n, the number of parameters without the adapter's."""
    return sum(leaf.size for leaf in jax.tree.leaves(self.base_shapes))

  def initialize(self, random_seed: int) -> PyTree:
    """Returns random parameters, for pretraining from scratch."""
    init = jax.jit(_initialize, static_argnums=0, out_shardings=self.shardings)
    return init(self._network, self._partitioner.key(random_seed))

  def check(self, seed: seeds.Seed, base: bool = False) -> None:
    """Checks that a checkpoint fits this network.

    Args:
      seed: the checkpoint.
      base: whether to expect it without the adapter's parameters.

    Raises:
      UserError: it does not fit.
    """
    expected = (
      self.base_shapes if base else without_fixed(self._network, self.shapes)
    )
    expected = jax.eval_shape(stacking.unstack_layers, expected)
    matching.check(seed, self._network, expected)

  def with_fixed(self, params: PyTree) -> PyTree:
    """Returns parameters with the adapter's fixed tensors.

    Args:
      params: host arrays, unstacked.

    Raises:
      UserError: the adapter does not go with them.
    """
    return with_fixed(self._network, self.shapes, params)

  def to_devices(self, params: PyTree, like: PyTree | None = None) -> PyTree:
    """Returns parameters on the devices, with their shardings.

    Args:
      params: host arrays, unstacked or with the network's structure.
      like: a tree of the parameters to place; None for all of `params`.
    """
    if self._network.scan_layers:
      params = stacking.stack_layers(params)
    params = parts.select(params, params if like is None else like)
    shardings = parts.select(self.shardings, params)
    placed = jax.tree.map(partitioning.place, params, shardings)
    # A copy: XLA:CPU may share memory with a host array, and the training step
    # donates its inputs.
    return jax.jit(_copy, out_shardings=shardings)(placed)


def choose_mesh(
  network: api.Network,
  partitioner: partitioning.Partitioner,
  bytes_each: int,
  host: partitioning.Host | None = None,
) -> partitioning.Partitioner:
  """Returns the partitioner with the sizes that it leaves open chosen.

  Args:
    network: the model.
    partitioner: a partitioner that may have sizes None.
    bytes_each: see `Partitioner.fitted`.
    host: see `Partitioner.fitted`.
  """
  if jax.device_count() == 1:
    return partitioner
  size = sum(leaf.size for leaf in jax.tree.leaves(api.shapes(network)))
  fitted = partitioner.fitted(size, bytes_each, host)
  logging.info('mesh: %s', fitted)
  return fitted


class Loaded(NamedTuple):
  """A loaded checkpoint.

  Attributes:
    network: the model, with the checkpoint's adapter if it has one.
    params: the parameters, on the devices.
    step: the training step at which they were saved; 0 if unknown.
  """

  network: api.Network
  params: PyTree
  step: int


def load(
  network: api.Network,
  partitioner: partitioning.Partitioner,
  path: str,
  step: int | None = None,
  seed_path: str | None = None,
) -> Loaded:
  """Loads a checkpoint for a network; see `seeds.load_seed`.

  Raises:
    UserError: it cannot be loaded, or does not fit the network.
  """
  found = seeds.load_seed(path, step, seed_path)
  network = adapted.with_adapter(network, found.adapter)
  space = ParameterSpace(network, partitioner)
  space.check(found)
  params = space.with_fixed(found.params)
  return Loaded(network, space.to_devices(params), found.step)


def with_fixed(network: api.Network, shapes: PyTree, params: PyTree) -> PyTree:
  """Returns a network's parameters with its adapter's fixed tensors.

  Args:
    network: the network.
    shapes: the shapes of all its parameters.
    params: host arrays, unstacked.

  Raises:
    UserError: the adapter does not go with them.
  """
  adapter = network.adapter
  if not adapter.fixed:
    return params
  paths = parts.flatten(jax.eval_shape(stacking.unstack_layers, shapes))
  modules = adapters.modules_of(paths, adapter.fixed)
  flat = adapter.without_fixed(parts.flatten(params))
  return parts.unflatten(flat | adapter.fixed_tensors(modules, flat))


def without_fixed(network: api.Network, params: PyTree) -> PyTree:
  """Returns parameters, or shapes, without the adapter's fixed tensors."""
  flat = parts.flatten(params)
  return parts.unflatten(network.adapter.without_fixed(flat))


def initialize_added(
  network: api.Network,
  seed: PyTree,
  random_seed: int,
  encode: Callable[[str], list[int]],
  partitioner: partitioning.Partitioner | None = None,
) -> PyTree:
  """Returns the initial values of an adapter's parameters, on the host.

  They have their layers one by one.

  Args:
    network: the network with the adapter.
    seed: the pretrained parameters, unstacked, and the adapter's fixed tensors.
    random_seed: the seed of random initial values.
    encode: text -> ids, for prompts that start as texts.
    partitioner: the mesh of all processes, if several initialize together.
  """
  key, everywhere = jax.random.key(random_seed), None
  if partitioner is not None:
    key, everywhere = partitioner.key(random_seed), partitioner.replicated
  init = jax.jit(_added, static_argnums=0, out_shardings=everywhere)
  drawn = jax.tree.map(np.asarray, init(network, key))
  drawn = parts.flatten(stacking.unstack_layers(parts.unflatten(drawn)))
  random = np.random.default_rng(random_seed)
  return parts.unflatten(
    network.adapter.initialize(
      drawn, parts.flatten(seed), random, encode, network.embedding_scale
    )
  )


def _initialize(network: api.Network, key: jax.Array) -> PyTree:
  return network.initialize(key)['params']


def _added(network: api.Network, key: jax.Array) -> dict[str, jax.Array]:
  base = parts.flatten(api.shapes(network.base))
  params = parts.flatten(without_fixed(network, _initialize(network, key)))
  return {path: x for path, x in params.items() if path not in base}


def _copy(tree: PyTree) -> PyTree:
  return jax.tree.map(jnp.copy, tree)
