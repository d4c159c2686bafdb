"""The model contract: all that the rest of the package asks of a network.

A network subclasses `Network`, most often together with Flax's `nn.Module`.
Training, evaluation, decoding, serving, planning and checkpoints use nothing
else of it, so that a network of another shape, with other features, works in
all of them.

Parameters. `init` gives the collections `params` and `params_axes`, as
`flax.linen.partitioning.param_with_axes` makes them, with T5X's names of axes.
The layers of a stack are the modules `layers_0`, `layers_1`, …; or, where
`scan_layers` is true, one module `layers` whose parameters have the layer as
axis 0. From these names follow the layer and the module of a parameter, and
so the silos: see `method.silos`.

Batches. A batch is a dict of arrays [batch, length] that the network's feature
converter makes. The network chooses their names, and how they are padded. A
prompt is filled up with `pad_id`.

Modules. Linear maps and tables of embeddings are modules like Flax's `Dense`
and `Embed`, with its names of their parameters: these are what adapters change,
and what `serving` corrects for each example of a batch; see `adapters.api`.

Networks are compared and hashed, as static arguments of compiled functions: a
network's fields are frozen.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp

from dst_t5x.adapters import api as adapters
from dst_t5x.models import own_tensors

Array = jax.Array
PyTree = Any
Batch = Mapping[str, Array]
Shapes = dict[str, tuple[int, int]]


class Targets(NamedTuple):
  """What a batch's logits are compared with.

  Attributes:
    tokens: int32 [batch, length].
    weights: [batch, length], of each token's loss; 0 for padding.
    segments: int32 [batch, length], which example of a packed row a token
      belongs to; None where rows are not packed.
  """

  tokens: Array
  weights: Array
  segments: Array | None = None


class DecodingStart(NamedTuple):
  """A batch of prompts, ready to be continued.

  Attributes:
    step: maps tokens [rows] and a cache to logits [rows, vocab] and the next
      cache.
    cache: of all rows; leaves without axes belong to all of them.
    batch_axis: the axis of the rows in all other leaves.
    first: int32 [rows], the tokens of the first step.
  """

  step: Callable[[Array, PyTree], tuple[Array, PyTree]]
  cache: PyTree
  batch_axis: int
  first: Array


class Work(NamedTuple):
  """What the forward pass of one example takes.

  Attributes:
    tokens: that are read, padding included.
    products: of weights and activations; attention's own are not among them.
  """

  tokens: int
  products: int


class Network:
  """A language model with parameters to be tuned."""

  @property
  def base(self) -> 'Network':
    """The network without an adapter."""
    return self

  @property
  def adapter(self) -> adapters.Adapter:
    """What changes the network from outside; see `adapted.with_adapter`."""
    return adapters.NONE

  @property
  def vocab_size(self) -> int:
    """The number of token ids that have an embedding."""
    raise NotImplementedError

  @property
  def pad_id(self) -> int:
    """What fills up prompts: no token's id."""
    return 0

  @property
  def eos_id(self) -> int:
    """The token that ends a sequence."""
    return 1

  @property
  def begin_id(self) -> int | None:
    """The token before every example; None for none."""
    return None

  @property
  def scan_layers(self) -> bool:
    """Whether layers are stacked on axis 0 of parameters and cache."""
    raise NotImplementedError

  @property
  def output_matrix(self) -> str | None:
    """The path of the matrix that gives the logits; None where it is tied."""
    raise NotImplementedError

  def initialize(self, key: Array) -> PyTree:
    """Returns `params` and `params_axes`, random, for pretraining.

    Args:
      key: a PRNG key.
    """
    raise NotImplementedError

  def logits(
    self, params: PyTree, batch: Batch, dropout_key: Array | None = None
  ) -> Array:
    """Returns logits [batch, length, vocab], by teacher forcing.

    Args:
      params: the network's.
      batch: its features.
      dropout_key: a PRNG key; None for no dropout.
    """
    raise NotImplementedError

  def targets(self, batch: Batch) -> Targets:
    """Returns what the logits of a batch are compared with."""
    raise NotImplementedError

  def feature_converter(self, pack: bool, prefix: Sequence[int] = ()) -> Any:
    """Returns the `seqio.FeatureConverter` that makes the network's features.

    Args:
      pack: whether short examples share a row.
      prefix: ids that come before the inputs of every example, on top of their
        length.
    """
    raise NotImplementedError

  def batch_shapes(
    self, feature_lengths: Mapping[str, int], rows: int, pack: bool
  ) -> Shapes:
    """Returns feature -> [batch, length], as the feature converter makes them.

    Args:
      feature_lengths: of the task's features.
      rows: of the batch.
      pack: whether rows are packed.
    """
    raise NotImplementedError

  def prompt(self, example: Mapping[str, Any]) -> Any:
    """Returns what decoding starts from, int32 [length], of one example.

    Args:
      example: its features [length], not packed.
    """
    raise NotImplementedError

  def prompt_of_inputs(self, inputs: Any, prefix: Sequence[int] = ()) -> Any:
    """Returns what decoding starts from, int32 [length].

    Args:
      inputs: a task's feature `inputs`, int32 [inputs length], filled up with
        `pad_id` at the end.
      prefix: as of `feature_converter`.
    """
    raise NotImplementedError

  def start_decoding(
    self, params: PyTree, prompts: Array, beams: int, max_decode_length: int
  ) -> DecodingStart:
    """Reads prompts, and makes a cache for their continuations.

    Args:
      params: the network's.
      prompts: int32 [batch, length], filled up with `pad_id` at the end.
      beams: continuations of each prompt, adjacent rows of the cache.
      max_decode_length: tokens of a continuation at most.
    """
    raise NotImplementedError

  def own_tensors(
    self, tensors: own_tensors.Tensors
  ) -> own_tensors.Interceptor:
    """Returns what gives each example of a batch small tensors of its own.

    It is an interceptor for `nn.intercept_methods`, under which decoding starts
    and continues. Modules that work on each row by itself need no other.

    Args:
      tensors: path -> [batch, …], of all parameters but the matrices of linear
        maps and the tables of embeddings. The biases of linear maps are taken
        care of.
    """
    return own_tensors.interceptor(tensors)

  def work_of_example(
    self, shapes: Mapping[str, Any], feature_lengths: Mapping[str, int]
  ) -> Work:
    """Returns what the forward pass of one example takes.

    Args:
      shapes: path -> anything with a shape and a size, of all parameters.
      feature_lengths: of the task's features.
    """
    raise NotImplementedError

  def share(self, devices: int) -> Self:
    """Returns a network of the sizes that one device has of this one.

    Args:
      devices: among which heads, hidden units and the vocabulary are divided,
        as far as they can be evenly.
    """
    raise NotImplementedError

  def with_remat(self, remat: bool, layers: int | None = None) -> Self:
    """Returns the network with or without rematerialisation.

    Args:
      remat: whether the backward pass recomputes each layer from its input.
      layers: how many layers each stack has instead, one after the other.
    """
    raise NotImplementedError

  @property
  def remat(self) -> bool:
    """Whether the backward pass recomputes each layer from its input."""
    raise NotImplementedError


def shapes(network: Network) -> PyTree:
  """Returns the parameters' tree of jax.ShapeDtypeStruct."""
  return abstract(network)['params']


def abstract(network: Network) -> PyTree:
  """Returns what `initialize` does, abstractly: nothing is allocated."""
  return jax.eval_shape(network.initialize, jax.random.key(0))


def is_empty(network: Network, prompts: Array) -> Array:
  """Returns bool [batch]: a prompt that only fills up the batch."""
  return ~jnp.any(prompts != network.pad_id, axis=-1)
