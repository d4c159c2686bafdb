"""A network with an adapter, which is itself a network.

The adapter is applied from outside; see `adapters.api`.
"""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

from flax import linen as nn
import jax

from dst_t5x.adapters import api as adapters
from dst_t5x.models import api
from dst_t5x.models import own_tensors

Array = jax.Array
PyTree = Any


@dataclasses.dataclass(frozen=True)
class Adapted(api.Network):
  """A network whose linear maps and embeddings an adapter changes.

  Attributes:
    network: the network without the adapter.
    applied: the adapter.
  """

  network: api.Network
  applied: adapters.Adapter

  @property
  def base(self) -> api.Network:
    """See `api.Network`."""
    return self.network

  @property
  def adapter(self) -> adapters.Adapter:
    """See `api.Network`."""
    return self.applied

  def _intercepted(self) -> Any:
    return nn.intercept_methods(self.applied.intercept)

  @property
  def _prefix(self) -> tuple[int, ...]:
    return self.applied.prefix(self.network.vocab_size)

  def _lengths(self, feature_lengths: Mapping[str, int]) -> dict[str, int]:
    """Returns the features' lengths, with the adapter's prefix."""
    longer = feature_lengths['inputs'] + len(self._prefix)
    return {**feature_lengths, 'inputs': longer}

  @property
  def vocab_size(self) -> int:
    """See `api.Network`."""
    return self.network.vocab_size

  @property
  def activation_dtype(self) -> Any:
    """See `api.Network`."""
    return self.network.activation_dtype

  @property
  def embedding_scale(self) -> float:
    """See `api.Network`."""
    return self.network.embedding_scale

  @property
  def scan_layers(self) -> bool:
    """See `api.Network`."""
    return self.network.scan_layers

  @property
  def output_matrix(self) -> str | None:
    """See `api.Network`."""
    return self.network.output_matrix

  @property
  def remat(self) -> bool:
    """See `api.Network`."""
    return self.network.remat

  def initialize(self, key: Array) -> PyTree:
    """See `api.Network`."""
    with self._intercepted():
      return self.network.initialize(key)

  def logits(
    self, params: PyTree, batch: api.Batch, dropout_key: Array | None = None
  ) -> Array:
    """See `api.Network`."""
    with self._intercepted():
      return self.network.logits(params, batch, dropout_key)

  def targets(self, batch: api.Batch) -> api.Targets:
    """See `api.Network`."""
    return self.network.targets(batch)

  def feature_converter(self, pack: bool, prefix: Sequence[int] = ()) -> Any:
    """See `api.Network`."""
    return self.network.feature_converter(pack, (*prefix, *self._prefix))

  def batch_shapes(
    self, feature_lengths: Mapping[str, int], rows: int, pack: bool
  ) -> api.Shapes:
    """See `api.Network`."""
    return self.network.batch_shapes(self._lengths(feature_lengths), rows, pack)

  def prompt(self, example: Mapping[str, Any]) -> Any:
    """See `api.Network`."""
    return self.network.prompt(example)

  @property
  def pad_id(self) -> int:
    """See `api.Network`."""
    return self.network.pad_id

  @property
  def eos_id(self) -> int:
    """See `api.Network`."""
    return self.network.eos_id

  @property
  def begin_id(self) -> int | None:
    """See `api.Network`."""
    return self.network.begin_id

  def prompt_of_inputs(self, inputs: Any, prefix: Sequence[int] = ()) -> Any:
    """See `api.Network`."""
    return self.network.prompt_of_inputs(inputs, (*prefix, *self._prefix))

  def start_decoding(
    self, params: PyTree, prompts: Array, beams: int, max_decode_length: int
  ) -> api.DecodingStart:
    """See `api.Network`."""
    with self._intercepted():
      start = self.network.start_decoding(
        params, prompts, beams, max_decode_length
      )

    def step(tokens: Array, cache: PyTree) -> tuple[Array, PyTree]:
      with self._intercepted():
        return start.step(tokens, cache)

    return start._replace(step=step)

  def own_tensors(
    self, tensors: own_tensors.Tensors
  ) -> own_tensors.Interceptor:
    """See `api.Network`."""
    return self.network.own_tensors(tensors)

  def work_of_example(
    self, shapes: Mapping[str, Any], feature_lengths: Mapping[str, int]
  ) -> api.Work:
    """See `api.Network`."""
    return self.network.work_of_example(shapes, self._lengths(feature_lengths))

  def share(self, devices: int) -> 'Adapted':
    """See `api.Network`."""
    return Adapted(self.network.share(devices), self.applied)

  def with_remat(self, remat: bool, layers: int | None = None) -> 'Adapted':
    """See `api.Network`."""
    return Adapted(self.network.with_remat(remat, layers), self.applied)

  def with_layers(self, layers: int) -> 'Adapted':
    """See `api.Network`."""
    return Adapted(self.network.with_layers(layers), self.applied)


def with_adapter(
  network: api.Network, adapter: adapters.Adapter | None = None
) -> api.Network:
  """Returns the network with this adapter instead of its own; None for none."""
  adapter = adapter or adapters.NONE
  if network.adapter == adapter:
    return network
  return Adapted(network.base, adapter) if adapter.added else network.base
