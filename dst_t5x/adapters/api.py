"""What a tuning method adds to the network, and how the network asks for it.

The network asks its adapter wherever it applies a linear map, and where the
encoder looks up its tokens. An adapter is a dataclass of its settings, so that
a checkpoint can say which one it belongs to. LoRA, (IA)³ and prompts are
subclasses, each in a file of its own.
"""

from collections.abc import Callable, Mapping
import dataclasses
import re
from typing import Any, ClassVar, NamedTuple, Self

from flax import linen as nn
import jax
import numpy as np

from dst_t5x.core.errors import UserError

Array = jax.Array


class Linear(NamedTuple):
  """A linear map that an adapter may change.

  Attributes:
    apply: the map itself, `[…, n] -> […, features]`.
    path: of its module: `encoder/layers_0/attention/query`, or with stacked
      layers `encoder/layers/attention/query`.
    features: size of the output's last axis.
    axes: logical names of the kernel's axes.
    dtype: of the activations.
    deterministic: whether dropout is off.
  """

  apply: Callable[[Array], Array]
  path: str
  features: int
  axes: tuple[str, str]
  dtype: Any
  deterministic: bool


@dataclasses.dataclass(frozen=True)
class Adapter:
  """Adds nothing: the base class of what does.

  A subclass makes its parameters with `partitioning.param_with_axes`; they
  live in the module that asks, beside its kernel.

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

  def embed(
    self, apply: Callable[[Array], Array], tokens: Array, vocab_size: int
  ) -> Array:
    """Maps the encoder's tokens `[batch, length]` to `[…, embed]`."""
    del vocab_size
    return apply(tokens)

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
    """Returns the initial parameters, where these hang on the seed.

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


def of(network: nn.Module) -> Adapter:
  """Returns a network's adapter."""
  return getattr(getattr(network, 'config', None), 'adapter', NONE)


def prefix(network: nn.Module) -> tuple[int, ...]:
  """Returns the ids that the data puts before the inputs of an example."""
  adapter = of(network)
  if not adapter.added:
    return ()
  return adapter.prefix(network.config.vocab_size)


def replaced(network: nn.Module, adapter: Adapter) -> nn.Module:
  """Returns the network with another adapter, or with none: `NONE`."""
  if of(network) == adapter:
    return network
  config: Any = network.config
  return network.clone(config=dataclasses.replace(config, adapter=adapter))
