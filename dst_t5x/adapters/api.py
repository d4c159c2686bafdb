"""Adapters: what a tuning method adds to a network, from outside.

A network has no fields for adapters. An adapter changes the results of the
network's linear maps and token embeddings through Flax's method interception.
It works on any network whose modules are Flax's or have the same attributes,
such as ours, T5X's or a user's. An adapter is a dataclass of its settings, so
that a checkpoint can state which adapter it belongs to. LoRA, (IA)³ and prompts
are subclasses.

Some adapters also use tensors that nobody trains, such as VeRA's shared random
matrices. The adapter recomputes these `fixed` tensors from its settings and the
seed. They exist only where a network computes: checkpoints and exports do not
have them, and no budget counts them.
"""

from collections.abc import Callable, Collection, Mapping
import dataclasses
import math
import re
from typing import Any, ClassVar, Self

from flax import linen as nn
import jax
import numpy as np

from dst_t5x.adapters import network_parts
from dst_t5x.adapters import peft
from dst_t5x.core import json_object
from dst_t5x.core.errors import UserError

Array = jax.Array


# The names under which adapters know them.
KERNEL, BIAS, TABLE = (
  network_parts.KERNEL,
  network_parts.BIAS,
  network_parts.TABLE,
)
Part = network_parts.Part
Linear = network_parts.Linear
Embedding = network_parts.Embedding
parameter = network_parts.parameter
is_linear = network_parts.is_linear
is_embedding = network_parts.is_embedding


@dataclasses.dataclass(frozen=True)
class Adapter:
  """The base class of adapters; changes nothing.

  A subclass makes its parameters with `Part.parameter`.

  Attributes:
    added: regular expression that matches the paths of its parameters.
    fixed: the same for the paths of its fixed tensors; '' if it has none.
    peft_type: what Hugging Face PEFT calls such adapters; '' if it has none.
      One that it has overrides `peft_settings`, `peft_read` and `peft_tensors`.
    peft_options: what adapter_config.json states of this adapter, and not of
      others of the same `peft_type`.
    peft_share: how many numbers PEFT's file has for each of its parameters.
  """

  kinds: ClassVar[dict[str, type['Adapter']]] = {}
  added: ClassVar[str] = ''
  fixed: ClassVar[str] = ''
  peft_type: ClassVar[str] = ''
  peft_options: ClassVar[Mapping[str, Any]] = {}
  peft_share: ClassVar[int] = 1

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
    if (size := network_parts.vocab_size(module)) is not None:
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

    All parameters have their layers one by one.

    Args:
      added: path -> the adapter's parameters from the network's initialisation.
      seed: path -> the seed's parameters, and the adapter's fixed tensors.
      random: the run's random generator.
      encode: text -> pieces of the task's vocabulary.
      embedding_scale: what the network multiplies embeddings by.
    """
    del seed, random, encode, embedding_scale
    return dict(added)

  def fixed_tensors(
    self, modules: Collection[str], seed: Mapping[str, np.ndarray]
  ) -> dict[str, np.ndarray]:
    """Returns path -> fixed tensor.

    Args:
      modules: paths of the linear maps that it adapts.
      seed: path -> the seed's parameters.

    Raises:
      UserError: a setting does not go with the seed.
    """
    del modules, seed
    return {}

  def without_added(
    self, params: Mapping[str, np.ndarray]
  ) -> dict[str, np.ndarray]:
    """Returns path -> parameter without the adapter's parameters."""
    return {
      path: np.asarray(tensor)
      for path, tensor in self.without_fixed(params).items()
      if not re.fullmatch(self.added, path)
    }

  def without_fixed(self, params: Mapping[str, Any]) -> dict[str, Any]:
    """Returns path -> parameter without the fixed tensors."""
    return {
      path: tensor
      for path, tensor in params.items()
      if not re.fullmatch(self.fixed, path)
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

  def peft_arrays(
    self, added: Mapping[str, np.ndarray]
  ) -> Mapping[str, np.ndarray]:
    """Returns path -> what `peft_tensors` writes.

    Args:
      added: path -> its parameters and fixed tensors, layers one by one.
    """
    return added

  def peft_fixed(
    self, modules: Collection[str], base: peft.Base
  ) -> dict[str, np.ndarray]:
    """Returns name in PEFT's file -> fixed tensor that it may have.

    Arguments as of `peft_settings`.
    """
    del modules, base
    return {}

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


def modules_of(paths: Collection[str], pattern: str) -> list[str]:
  """Returns the paths of the modules whose parameters match, sorted."""
  return sorted(
    {p.rpartition('/')[0] for p in paths if re.fullmatch(pattern, p)}
  )


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
