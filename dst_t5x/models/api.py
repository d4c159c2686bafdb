"""The model contract: the interface of every network.

A network subclasses `Network`, usually together with Flax's `nn.Module`.
Training, evaluation, decoding, serving, planning and checkpoints use a network
only through this interface. They therefore work with a network of any shape
that reads any features.

Parameters. `initialize` returns the collections `params` and `params_axes`, as
`flax.linen.partitioning.param_with_axes` makes them, with T5X's names of axes.
The layers of a stack are modules `layers_0`, `layers_1`, …. If `scan_layers` is
true, they are one module `layers` whose parameters have the layer as axis 0.
These names determine a parameter's layer, module and silo: see `method.silos`.

Batches. A batch is a dict of arrays [batch, length] that the network's feature
converter makes. The network chooses their names and padding. Prompts are padded
at the end with `pad_id`.

Modules. Linear maps and tables of embeddings are modules like Flax's `Dense`
and `Embed`, and name their parameters as Flax does. Adapters change these
modules, and `serving` corrects them for each example; see `adapters.api`. A
table of embeddings may have a field `scale`, a factor of what is looked up.

Networks are static arguments of compiled functions. They must be immutable, and
compare and hash by value.
"""

from collections.abc import Callable, Mapping, Sequence
import functools
from typing import Any, NamedTuple, Protocol, Self

import jax
import jax.numpy as jnp

from dst_t5x.adapters import api as adapters
from dst_t5x.models import own_tensors

Array = jax.Array
PyTree = Any
Batch = Mapping[str, Array]
Shapes = dict[str, tuple[int, int]]


class Targets(NamedTuple):
  """The tokens that a batch's logits are to predict.

  Attributes:
    tokens: int32 [batch, length].
    weights: [batch, length], the weight of each token's loss; 0 for padding.
    segments: int32 [batch, length], the number of a token's example in its
      packed row; None if rows are not packed.
  """

  tokens: Array
  weights: Array
  segments: Array | None = None


class DecodingStart(NamedTuple):
  """The start of decoding a batch of prompts.

  Attributes:
    step: maps tokens [rows] and a cache to logits [rows, vocab] and the next
      cache.
    cache: the cache of all rows. All rows share its scalar leaves.
    batch_axis: the axis of the rows in the other leaves.
    first: int32 [rows], the tokens of the first step.
  """

  step: Callable[[Array, PyTree], tuple[Array, PyTree]]
  cache: PyTree
  batch_axis: int
  first: Array


class Slots(Protocol):
  """A cache of rows that begin and end at different steps.

  `params` and `length` are those of `Network.slots`. All methods are pure
  functions, to be used within one compiled function.
  """

  def blank(self, count: int) -> PyTree:
    """Returns the cache of `count` slots, which are axis 0 of all leaves."""

  def fill(self, cache: PyTree, slots: Array, prompts: Array) -> PyTree:
    """Returns the cache with prompts in some slots, whatever was there.

    Args:
      cache: the cache.
      slots: int32 [batch]; a prompt whose slot does not exist is dropped.
      prompts: int32 [batch, length], padded with `pad_id` at the end.
    """

  def step(
    self, cache: PyTree, tokens: Array, positions: Array
  ) -> tuple[Array, PyTree]:
    """Reads a token of each row; the first is the last one of its prompt.

    Args:
      cache: the cache; its first slots are the rows'. It may have more slots:
        they cost nothing, as only the rows' new entries are written.
      tokens: int32 [rows].
      positions: int32 [rows], where the tokens are in their rows, from 0.

    Returns:
      Logits, float32 [rows, vocab], and the next cache.
    """


class Work(NamedTuple):
  """The cost of the forward pass of one example.

  Attributes:
    tokens: the number of tokens that are read, padding included.
    products: the number of products of a weight and an activation. Products of
      two activations, in attention, are not counted.
  """

  tokens: int
  products: int


class Network:
  """A language model; see the module."""

  @property
  def base(self) -> 'Network':
    """The network without an adapter."""
    return self

  @property
  def adapter(self) -> adapters.Adapter:
    """The adapter that is applied to it; see `adapted.with_adapter`."""
    return adapters.NONE

  @property
  def vocab_size(self) -> int:
    """The number of token ids that have an embedding."""
    raise NotImplementedError

  @property
  def activation_dtype(self) -> Any:
    """The type that layers compute in."""
    raise NotImplementedError

  @property
  def pad_id(self) -> int:
    """The id of padding; no token has it."""
    return 0

  @property
  def eos_id(self) -> int:
    """The id of the token that ends a sequence."""
    return 1

  @property
  def begin_id(self) -> int | None:
    """The id of the token before every example; None if there is none."""
    return None

  @property
  def embedding_scale(self) -> float:
    """What the embeddings of tokens are multiplied by, after the lookup."""
    return 1.0

  @property
  def scan_layers(self) -> bool:
    """Whether parameters and cache have the layer as axis 0."""
    raise NotImplementedError

  @property
  def output_matrix(self) -> str | None:
    """The path of the matrix that gives the logits; None if it is tied."""
    raise NotImplementedError

  def initialize(self, key: Array) -> PyTree:
    """Returns random `params`, and `params_axes`.

    Args:
      key: a PRNG key.
    """
    raise NotImplementedError

  def logits(
    self, params: PyTree, batch: Batch, dropout_key: Array | None = None
  ) -> Array:
    """Returns logits [batch, length, vocab], by teacher forcing.

    Args:
      params: the parameters.
      batch: the features that the feature converter makes.
      dropout_key: a PRNG key; None for no dropout.
    """
    raise NotImplementedError

  def targets(self, batch: Batch) -> Targets:
    """Returns the tokens that a batch's logits are to predict."""
    raise NotImplementedError

  def feature_converter(self, pack: bool, prefix: Sequence[int] = ()) -> Any:
    """Returns the `seqio.FeatureConverter` that makes the network's features.

    Args:
      pack: whether several short examples share a row.
      prefix: ids to insert before the inputs of every example. They come on top
        of the inputs' length.
    """
    raise NotImplementedError

  def batch_shapes(
    self, feature_lengths: Mapping[str, int], rows: int, pack: bool
  ) -> Shapes:
    """Returns the shapes [batch, length] of the converter's features, by name.

    Args:
      feature_lengths: the lengths of the task's features.
      rows: the number of rows of the batch.
      pack: whether rows are packed.
    """
    raise NotImplementedError

  def prompt(self, example: Mapping[str, Any]) -> Any:
    """Returns the prompt of one example, int32 [length].

    Args:
      example: the example's features [length], not packed.
    """
    raise NotImplementedError

  def prompt_of_inputs(self, inputs: Any, prefix: Sequence[int] = ()) -> Any:
    """Returns the prompt of a task's inputs, int32 [length].

    Args:
      inputs: the task's feature `inputs`, int32 [inputs length], padded with
        `pad_id` at the end.
      prefix: see `feature_converter`.
    """
    raise NotImplementedError

  def start_decoding(
    self, params: PyTree, prompts: Array, beams: int, max_decode_length: int
  ) -> DecodingStart:
    """Reads prompts, and returns a cache and a step for continuations.

    Args:
      params: the parameters.
      prompts: int32 [batch, length], padded with `pad_id` at the end.
      beams: the number of continuations of each prompt. They are adjacent rows.
      max_decode_length: the most tokens of a continuation.
    """
    raise NotImplementedError

  def slots(self, params: PyTree, length: int) -> Slots | None:
    """Returns slots that rows can join and leave while others are decoded.

    They are for networks whose continuations are read like their prompts; None
    for any other.

    Args:
      params: the parameters, which are not stacked.
      length: the most tokens of a row, of its prompt and its continuation.
    """
    del params, length
    return None

  def own_tensors(
    self, tensors: own_tensors.Tensors
  ) -> own_tensors.Interceptor:
    """Returns an interceptor that gives each example its own small tensors.

    `start_decoding` and its steps run under it, by `nn.intercept_methods`. The
    default suits modules that treat each row separately.

    Args:
      tensors: path -> [batch, …], for all parameters except the matrices of
        linear maps and the tables of embeddings. The caller handles the biases
        of linear maps itself.
    """
    return own_tensors.interceptor(tensors)

  def work_of_example(
    self, shapes: Mapping[str, Any], feature_lengths: Mapping[str, int]
  ) -> Work:
    """Returns the cost of the forward pass of one example.

    Args:
      shapes: path -> anything with a shape and a size, for all parameters.
      feature_lengths: the lengths of the task's features.
    """
    raise NotImplementedError

  def share(self, devices: int) -> Self:
    """Returns a network with the sizes of one device's share of this one.

    Args:
      devices: the number of devices among which heads, hidden units and the
        vocabulary are divided. A size that it does not divide stays whole.
    """
    raise NotImplementedError

  def with_remat(self, remat: bool, layers: int | None = None) -> Self:
    """Returns the network with or without rematerialisation.

    Args:
      remat: whether the backward pass recomputes each layer from its input.
      layers: a new number of layers for each stack, which are then not stacked;
        None for no change.
    """
    raise NotImplementedError

  def with_layers(self, layers: int) -> Self:
    """Returns the network with another number of layers in each stack.

    Args:
      layers: the new number.
    """
    raise NotImplementedError

  @property
  def remat(self) -> bool:
    """Whether the backward pass recomputes each layer from its input."""
    raise NotImplementedError


def shapes(network: Network) -> PyTree:
  """Returns the parameters' shapes, a tree of `jax.ShapeDtypeStruct`."""
  return abstract(network)['params']


def abstract(network: Network) -> PyTree:
  """Returns the shapes of what `initialize` returns, without allocating it."""
  # One function for all calls: JAX remembers what it traced for a network.
  return _initialize.eval_shape(network, jax.random.key(0))


@functools.partial(jax.jit, static_argnums=0)
def _initialize(network: Network, key: Array) -> PyTree:
  return network.initialize(key)


def is_empty(network: Network, prompts: Array) -> Array:
  """Returns which prompts are all padding, bool [batch]."""
  return ~jnp.any(prompts != network.pad_id, axis=-1)
