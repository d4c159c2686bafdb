"""Adapters: what a tuning method adds to a network, from outside.

A network has no fields for adapters. An adapter changes the results of the
network's linear maps and token embeddings through Flax's method interception.
It works on any network whose modules are Flax's or have the same attributes,
such as ours, T5X's or a user's. An adapter is a dataclass of its settings, so
that a checkpoint can state which adapter it belongs to. LoRA, (IA)³ and prompts
are subclasses.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
import dataclasses
import math
import re
from typing import Any, ClassVar, Self

from flax import linen as nn
from flax.linen import partitioning
import jax
import jax.numpy as jnp
import numpy as np

from dst_t5x.adapters import peft
from dst_t5x.core import json_object
from dst_t5x.core.errors import UserError

Array = jax.Array
Axes = tuple[str | None, ...]


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


@dataclasses.dataclass(frozen=True)
class Adapter:
  """The base class of adapters; changes nothing.

  A subclass makes its parameters with `Part.parameter`.

  Attributes:
    added: regular expression that matches the paths of its parameters.
    peft_type: what Hugging Face PEFT calls such adapters; '' if it has none.
      One that it has overrides the three methods whose names begin so.
  """

  kinds: ClassVar[dict[str, type['Adapter']]] = {}
  added: ClassVar[str] = ''
  peft_type: ClassVar[str] = ''

  def __init_subclass__(cls) -> None:
    known = Adapter.kinds.get(cls.__name__)
    # Gin's wrapper of a class is a subclass of the same name.
    if known is None or not issubclass(cls, known):
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
    """Intercepts a call; an interceptor for `nn.intercept_methods`."""
    module = context.module
    if context.method_name != '__call__' or len(args) != 1:
      return call(*args, **kwargs)
    if is_linear(module):
      return _linear(self, lambda x: call(x, **kwargs), module, args[0])
    if (size := _vocab_size(module)) is not None:
      embedding = Embedding(lambda x: call(x, **kwargs), module, size)
      return self.embed(embedding, args[0])
    return call(*args, **kwargs)

  def prefix(self, vocab_size: int) -> tuple[int, ...]:
    """Returns ids that the data puts before the inputs of each example."""
    del vocab_size
    return ()

  def initialize(
    self,
    added: Mapping[str, np.ndarray],
    seed: Mapping[str, np.ndarray],
    random: np.random.Generator,
    encode: Callable[[str], list[int]],
    embedding_scale: float = 1.0,
  ) -> dict[str, np.ndarray]:
    """Returns the initial parameters; they may depend on the seed.

    Args:
      added: path -> the adapter's parameters from the network's initialisation.
      seed: path -> the seed's parameters.
      random: the run's random generator.
      encode: text -> pieces of the task's vocabulary.
      embedding_scale: what the network multiplies embeddings by.
    """
    del seed, random, encode, embedding_scale
    return dict(added)

  def without_added(
    self, params: Mapping[str, np.ndarray]
  ) -> dict[str, np.ndarray]:
    """Returns path -> parameter without the adapter's parameters."""
    return {
      path: np.asarray(tensor)
      for path, tensor in params.items()
      if not re.fullmatch(self.added, path)
    }

  def merge(self, params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the parameters of an equivalent network without the adapter.

    Args:
      params: path -> parameter, including the adapter's.

    Raises:
      UserError: there is no such network.
    """
    return dict(params)

  def peft_settings(
    self, modules: Collection[str], base: peft.Base
  ) -> dict[str, Any]:
    """Returns what adapter_config.json says of it, but for what it adapts.

    Args:
      modules: paths of the linear maps that it adapts.
      base: the model that it belongs to.
    """
    raise NotImplementedError

  @classmethod
  def peft_read(
    cls,
    stated: json_object.JsonObject,
    modules: Collection[str],
    base: peft.Base,
  ) -> Self:
    """Returns the adapter that an adapter_config.json states.

    Args:
      stated: its content.
      modules: paths of the linear maps that it adapts.
      base: the model that it belongs to.

    Raises:
      UserError: a setting is missing or makes no sense.
    """
    raise NotImplementedError

  def peft_tensors(
    self, modules: Collection[str], base: peft.Base
  ) -> list[peft.Tensor]:
    """Returns its tensors in PEFT's file; arguments as of `peft_settings`."""
    raise NotImplementedError

  def to_json(self) -> dict[str, Any]:
    """Returns the settings, for `from_json`."""
    return {'kind': type(self).__name__, **dataclasses.asdict(self)}

  @classmethod
  def from_json(cls, content: Mapping[str, Any]) -> Self:
    """Returns the adapter with the settings of `to_json`.

    Raises:
      UserError: the kind of adapter is unknown.
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

# What a linear map calls its matrix [n, features] and its bias [features], and
# what a table of embeddings calls itself [vocab, embed]: Flax's names.
KERNEL, BIAS, TABLE = 'kernel', 'bias', 'embedding'


def is_linear(module: nn.Module) -> bool:
  """Returns whether a module is a linear map, such as Flax's `Dense`."""
  return (
    hasattr(module, 'features')
    and hasattr(module, 'kernel_init')
    and not hasattr(module, 'kernel_size')
  )


def is_embedding(module: nn.Module) -> bool:
  """Whether a module is a table of embeddings: Flax's `Embed`, or like it."""
  return _vocab_size(module) is not None


def _vocab_size(module: nn.Module) -> int | None:
  """Returns the number of rows of a table of embeddings; None for others."""
  if not hasattr(module, 'attend'):
    return None
  size = getattr(module, 'num_embeddings', None)
  return getattr(module, 'vocab_size', None) if size is None else size


def _linear(
  adapter: Adapter, call: Callable[[Array], Array], module: Any, x: Array
) -> Array:
  """Applies an adapter to a linear map over one or several axes."""
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
