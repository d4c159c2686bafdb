"""Batches that are decoded at once, in few shapes, which are compiled."""

from collections.abc import Sequence
import functools
from typing import Any, NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dst_t5x.models import api
from dst_t5x.models import decoding
from dst_t5x.models import sampling
from dst_t5x.serving import corrections
from dst_t5x.serving import slots as slots_lib
from dst_t5x.subsets import on_device

PyTree = Any
Decoder = decoding.GreedyDecoder | decoding.BeamSearch | decoding.Sampling

LEAST_LENGTH = 16


class Batch(NamedTuple):
  """What is decoded at once.

  Attributes:
    prompts: int32 [batch, length].
    draws: how tokens are drawn; None where nothing is random.
  """

  prompts: Any
  draws: sampling.Draws | None


class How(NamedTuple):
  """The static arguments of a compiled function."""

  network: api.Network
  decoder: Decoder
  max_decode_length: int

  def __call__(self, params: PyTree, batch: Batch) -> Any:
    """Returns tokens and scores; see the decoders."""
    arguments = self.network, params, batch.prompts, self.max_decode_length
    if isinstance(self.decoder, decoding.Sampling):
      return self.decoder(*arguments, draws=batch.draws)
    return self.decoder(*arguments)


@functools.partial(jax.jit, static_argnames='how')
def decode_alone(params: PyTree, batch: Batch, how: How) -> Any:
  """Decodes all rows with the parameters as they are."""
  return how(params, batch)


@functools.partial(jax.jit, static_argnames=('how', 'rooms', 'tensors'))
def decode_mixed(
  params: PyTree,
  arrays: tuple[on_device.Arrays, ...],
  slots: slots_lib.Slots,
  batch: Batch,
  how: How,
  rooms: on_device.Rooms,
  tensors: on_device.Tensors,
) -> Any:
  """Decodes each row with the seed's parameters and its own subset."""
  stacked = jax.tree.map(lambda *vectors: jnp.stack(vectors), *arrays)
  own = corrections.own(tensors, params, stacked, rooms, slots)
  by_example = corrections.Corrections(how.network, tensors, rooms, own)
  with nn.intercept_methods(by_example.intercept):
    return how(params, batch)


def make(
  network: api.Network,
  inputs: Sequence[np.ndarray],
  draws: Sequence[sampling.Draws] | None,
  input_length: int | None,
) -> Batch:
  """Returns a batch whose sizes are powers of two: few shapes compile.

  Args:
    network: the model.
    inputs: int32 [length] each, as a task's feature `inputs`.
    draws: how the answer of each is drawn, [1]; None where nothing is random.
    input_length: of the longest inputs; no prompt is filled up beyond theirs.
  """
  prompts = [network.prompt_of_inputs(tokens) for tokens in inputs]
  longest = max(len(prompt) for prompt in prompts)
  length = max(LEAST_LENGTH, 1 << (longest - 1).bit_length())
  if input_length is not None:
    most = corrections.prompt_length(network, input_length)
    length = max(min(length, most), longest)
  size = 1 << (len(inputs) - 1).bit_length()
  batch = np.full((size, length), network.pad_id, np.int32)
  for i, prompt in enumerate(prompts):
    batch[i, : len(prompt)] = prompt
  if draws is None:
    return Batch(batch, None)
  # Rows that only fill up the batch draw as the first one does.
  filled = [*draws, *[draws[0]] * (size - len(draws))]
  return Batch(batch, jax.tree.map(lambda *x: np.concatenate(x), *filled))
