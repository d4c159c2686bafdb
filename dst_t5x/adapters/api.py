"""What a tuning method adds to a network, from outside.

A network carries no field for adapters. An adapter changes what the network's
linear maps and token embeddings return, through Flax's method interception, so
that it works on any network whose modules look like Flax's: ours, T5X's own,
or a user's. An adapter is a dataclass of its settings, so that a checkpoint can
say which one it belongs to. LoRA, (IA)³ and prompts are subclasses, each in a
file of its own.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import math
import re
from typing import Any, ClassVar, Self

from flax import linen as nn
from flax.linen import partitioning
import jax
import jax.numpy as jnp
import numpy as np

from dst_t5x.core.errors import UserError

Array = jax.Array
Axes = tuple[str | None, ...]


@dataclasses.dataclass(frozen=True)
class Part:
  """A part of a network that an adapter may change.

  Attributes:
    apply: what it does by itself.
    module: the Flax module that does it.
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
    """Returns a parameter beside the module's own; see `parameter`."""
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
    """The module's: `encoder/layers_0/attention/query`; `layers` if stacked."""
    return '/'.join(self.module.path)

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
  """Returns a float32 parameter that a module does not have by itself.

  Args:
    module: where it lives.
    name: what it is called there.
    init: `(key, shape, dtype) -> value`, as in `flax.linen.initializers`.
    shape: its shape.
    axes: logical names of its axes, for partitioning.
  """
  scope = module.scope
  assert scope is not None, 'an adapter needs a bound module'
  # Not `module.param`, which only compact methods and `setup` may call.
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


@dataclasses.dataclass(frozen=True)
class Adapter:
  """Adds nothing: the base class of what does.

  A subclass makes its parameters with `Part.parameter`.

  Attributes:
    added: a regular expression over paths, of the parameters that it adds.
  """

  kinds: ClassVar[dict[str, type['Adapter']]] = {}
  added: ClassVar[str] = ''

  def __init_subclass__(cls) -> None:
    Adapter.kinds[cls.__name__] = cls

  def linear(self, linear: Linear, x: Array) -> Array:
    """Maps `[…, n]` to `[…, features]`."""
    return linear.apply(x)

  def embed(self, embedding: Embedding, tokens: Array) -> Array:
    """Maps tokens `[batch, length]` to `[batch, length, embed]`."""
    return embedding.apply(tokens)

  def intercept(
    self,
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    context: nn.module.InterceptorContext,
  ) -> Any:
    """An interceptor for `nn.intercept_methods`."""
    module = context.module
    if context.method_name != '__call__' or len(args) != 1:
      return call(*args, **kwargs)
    if _is_linear(module):
      return _linear(self, lambda x: call(x, **kwargs), module, args[0])
    if (size := _vocab_size(module)) is not None:
      embedding = Embedding(lambda x: call(x, **kwargs), module, size)
      return self.embed(embedding, args[0])
    return call(*args, **kwargs)

  def prefix(self, vocab_size: int) -> tuple[int, ...]:
    """Returns the ids that the data puts before the inputs of an example."""
    del vocab_size
    return ()

  def initialize(
    self,
    added: Mapping[str, np.ndarray],
    seed: Mapping[str, np.ndarray],
    random: np.random.Generator,
    encode: Callable[[str], list[int]],
  ) -> dict[str, np.ndarray]:
    """Returns the initial parameters, where they depend on the seed.

    Args:
      added: path -> the adapter's parameters as the network initialises them.
      seed: path -> the seed's parameters.
      random: the run's.
      encode: text -> pieces of the task's vocabulary.
    """
    del seed, random, encode
    return dict(added)

  def without_added(
    self, params: Mapping[str, np.ndarray]
  ) -> dict[str, np.ndarray]:
    """Returns path -> the parameters that are not the adapter's."""
    return {
      path: np.asarray(tensor)
      for path, tensor in params.items()
      if not re.fullmatch(self.added, path)
    }

  def merge(self, params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the parameters of an equal network without the adapter.

    Args:
      params: path -> all parameters, the adapter's among them.

    Raises:
      UserError: there is none.
    """
    return dict(params)

  def to_json(self) -> dict[str, Any]:
    """Returns what `from_json` makes it of again."""
    return {'kind': type(self).__name__, **dataclasses.asdict(self)}

  @classmethod
  def from_json(cls, content: Mapping[str, Any]) -> Self:
    """Returns the adapter that `to_json` described.

    Raises:
      UserError: nothing of this kind is known.
    """
    fields = dict(content)
    kind = fields.pop('kind', None)
    if kind == Adapter.__name__:
      return cls()
    try:
      return cls.kinds[kind](**fields)  # type: ignore[return-value]
    except (KeyError, TypeError) as e:
      raise UserError(
        f'an adapter of kind {kind!r} is not known (known: '
        f'{sorted(cls.kinds)}): if it is your own, give its gin file as well'
      ) from e


NONE = Adapter()


def _is_linear(module: nn.Module) -> bool:
  """Whether a module is a linear map: Flax's `Dense`, and those like it."""
  return (
    hasattr(module, 'features')
    and hasattr(module, 'kernel_init')
    and not hasattr(module, 'kernel_size')
  )


def _vocab_size(module: nn.Module) -> int | None:
  """Returns how many tokens a table of embeddings has; None if it is none."""
  if not hasattr(module, 'attend'):
    return None
  size = getattr(module, 'num_embeddings', None)
  return getattr(module, 'vocab_size', None) if size is None else size


def _linear(
  adapter: Adapter, call: Callable[[Array], Array], module: Any, x: Array
) -> Array:
  """Lets an adapter change a linear map of one or several axes."""
  axis = np.atleast_1d(getattr(module, 'axis', -1)) % x.ndim
  features = np.atleast_1d(module.features)
  n = math.prod(x.shape[i] for i in axis)
  axes = getattr(module, 'axes', None) or getattr(module, 'kernel_axes', None)

  def apply(flat: Array) -> Array:
    y = call(flat.reshape(x.shape))
    return y.reshape(*y.shape[: y.ndim - len(features)], -1)

  linear = Linear(
    apply, module, int(np.prod(features)), tuple(axes or (None, None))
  )
  y = adapter.linear(linear, x.reshape(*x.shape[: x.ndim - len(axis)], n))
  return y.reshape(*y.shape[:-1], *features)
