"""The parts of a network that an adapter may change, as an adapter sees them.

See `adapters.api`.
"""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any

from flax import linen as nn
from flax.linen import partitioning
import jax
import jax.numpy as jnp

Array = jax.Array
Axes = tuple[str | None, ...]

# What a linear map calls its matrix [n, features] and its bias [features], and
# what a table of embeddings calls itself [vocab, embed]: Flax's names.
KERNEL, BIAS, TABLE = 'kernel', 'bias', 'embedding'


@dataclasses.dataclass(frozen=True)
class Part:
  """A part of a network that an adapter may change.

  Attributes:
    apply: the part's own function.
    module: the Flax module of the part.
  """

  apply: Callable[[Array], Array]
  module: nn.Module

  def parameter(
    self,
    name: str,
    init: Callable[..., Array],
    shape: Sequence[int],
    axes: Axes,
  ) -> Array:
    """Returns a new parameter of the module; see the function `parameter`."""
    return parameter(self.module, name, init, shape, axes)


@dataclasses.dataclass(frozen=True)
class Linear(Part):
  """A linear map, `[…, n] -> […, features]`.

  Attributes:
    features: size of the output's last axis.
    axes: logical names of the kernel's axes.
  """

  features: int
  axes: tuple[str | None, str | None]

  @property
  def path(self) -> str:
    """The module's path, `layers_0/attention/query`."""
    return '/'.join(self.module.path)

  @property
  def kernel(self) -> Array:
    """The matrix [n, features], float32; exists after `apply`."""
    return self._of_module(KERNEL).reshape(-1, self.features)

  @property
  def bias(self) -> Array | None:
    """The bias [features], float32; None without one."""
    assert self.module.scope is not None, 'an adapter needs a bound module'
    if not self.module.scope.has_variable('params', BIAS):
      return None
    return self._of_module(BIAS).reshape(self.features)

  def _of_module(self, name: str) -> Array:
    assert self.module.scope is not None, 'an adapter needs a bound module'
    value = self.module.scope.get_variable('params', name)
    return jnp.asarray(value, jnp.float32)

  @property
  def dtype(self) -> Any:
    """The type of the activations."""
    return getattr(self.module, 'dtype', None) or jnp.float32

  @property
  def deterministic(self) -> bool:
    """Whether dropout is off."""
    return not self.module.has_rng('dropout')


@dataclasses.dataclass(frozen=True)
class Embedding(Part):
  """A table of embeddings, `[batch, length] -> [batch, length, embed]`.

  Attributes:
    vocab_size: rows of the table.
  """

  vocab_size: int


def parameter(
  module: nn.Module,
  name: str,
  init: Callable[..., Array],
  shape: Sequence[int],
  axes: Axes,
) -> Array:
  """Returns a new float32 parameter of a module.

  Args:
    module: the module that gets the parameter.
    name: the parameter's name.
    init: `(key, shape, dtype) -> value`, as in `flax.linen.initializers`.
    shape: the parameter's shape.
    axes: logical names of its axes, for partitioning.
  """
  scope = module.scope
  assert scope is not None, 'an adapter needs a bound module'
  # `module.param` works in compact methods and `setup` only.
  if scope.has_variable('params', name):
    value = scope.get_variable('params', name)
  else:
    value = scope.param(name, init, tuple(shape), jnp.float32)
  module.sow(
    'params_axes',
    f'{name}_axes',
    partitioning.AxisMetadata(axes),
    reduce_fn=lambda _, new: new,
  )
  return partitioning.with_sharding_constraint(
    value, jax.sharding.PartitionSpec(*axes)
  )


def is_linear(module: nn.Module) -> bool:
  """Returns whether a module is a linear map, such as Flax's `Dense`."""
  return (
    hasattr(module, 'features')
    and hasattr(module, 'kernel_init')
    and not hasattr(module, 'kernel_size')
  )


def is_embedding(module: nn.Module) -> bool:
  """Whether a module is a table of embeddings: Flax's `Embed`, or like it."""
  return vocab_size(module) is not None


def vocab_size(module: nn.Module) -> int | None:
  """Returns the number of rows of a table of embeddings; None for others."""
  if not hasattr(module, 'attend'):
    return None
  size = getattr(module, 'num_embeddings', None)
  return getattr(module, 'vocab_size', None) if size is None else size
