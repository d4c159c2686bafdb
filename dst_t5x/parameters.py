"""The network's parameters: their shapes, shardings, and way to the devices."""

from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from dst_t5x import partitioning
from dst_t5x import seeds
from dst_t5x import stacking

PyTree = Any


class ParameterSpace:
  """What the parameters of a network look like on a mesh.

  Attributes:
    shapes: tree of jax.ShapeDtypeStruct, as the network has it.
    shardings: tree of shardings.
  """

  def __init__(
    self, network: nn.Module, partitioner: partitioning.Partitioner
  ) -> None:
    """Works out shapes and shardings; allocates nothing."""
    self._network = network
    variables = jax.eval_shape(self._init, jax.random.key(0))
    self.shapes = variables['params']
    self.shardings = partitioner.parameters(variables['params_axes'])

  def _init(self, key: jax.Array) -> PyTree:
    tokens = jnp.ones((1, 2), jnp.int32)
    return self._network.init(key, tokens, tokens, tokens, enable_dropout=False)

  @property
  def stacked(self) -> bool:
    """Whether layers are stacked."""
    return 'layers' in self.shapes['encoder']

  @property
  def size(self) -> int:
    """The number of parameters, n."""
    return sum(leaf.size for leaf in jax.tree.leaves(self.shapes))

  def initialize(self, random_seed: int) -> PyTree:
    """Returns random parameters, for pretraining from scratch."""
    init = jax.jit(
      lambda key: self._init(key)['params'], out_shardings=self.shardings
    )
    return init(jax.random.key(random_seed))

  def to_devices(self, params: PyTree) -> PyTree:
    """Puts a checkpoint's parameters on the devices.

    Args:
      params: unstacked host arrays.

    Raises:
      UserError: they are not those of this network.
    """
    seeds.check_matches(params, self.unstacked_shapes)
    if self.stacked:
      params = stacking.stack_layers(params)
    placed = jax.device_put(params, self.shardings)
    # A copy of its own: XLA:CPU may share memory with a host array, and the
    # training step gives its inputs away.
    return jax.jit(
      lambda tree: jax.tree.map(jnp.copy, tree), out_shardings=self.shardings
    )(placed)

  @property
  def unstacked_shapes(self) -> PyTree:
    """The shapes of the same network's parameters, layer by layer."""
    if not self.stacked:
      return self.shapes
    return jax.eval_shape(stacking.unstack_layers, self.shapes)
