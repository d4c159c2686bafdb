"""T5X's encoder-decoder model around our network, decoders and loss."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

from flax import linen as nn
import seqio
from t5x import decoding as t5x_decoding
from t5x import models
from t5x import optimizers
from t5x.examples.t5 import network as t5x_network

from dst_t5x.adapters import api as adapters
from dst_t5x.data import task_examples
from dst_t5x.engine import losses
from dst_t5x.models import decoding
from dst_t5x.models.t5 import network as network_lib


class EncoderDecoderModel(models.EncoderDecoderModel):
  """T5X's model, made of what the gin files of this package say.

  It computes what T5X's does; only its arguments differ.
  """

  def __init__(
    self,
    network: nn.Module,
    task: str,
    optimizer: optimizers.OptimizerDef | None = None,
    decoder: decoding.GreedyDecoder | decoding.BeamSearch | None = None,
    loss: losses.Loss | None = None,
  ) -> None:
    """Makes the model.

    Args:
      network: ours, or T5X's own.
      task: whose vocabularies the model has.
      optimizer: T5X's, or one around it; None if nothing is trained.
      decoder: `decoding.GreedyDecoder` or `decoding.BeamSearch`, which T5X's
        own search then stands for; greedy by default.
      loss: its settings.
    """
    loss = loss or losses.Loss()
    features = seqio.get_mixture_or_task(task).output_features
    beams, decode = _search(decoder)
    super().__init__(
      module=network,
      input_vocabulary=features['inputs'].vocabulary,
      output_vocabulary=features['targets'].vocabulary,
      optimizer_def=optimizer,
      decode_fn=decode,
      feature_converter_cls=functools.partial(
        task_examples.FeatureConverter, adapters.prefix(network)
      ),
      label_smoothing=loss.label_smoothing,
      z_loss=loss.z_loss,
      loss_normalizing_factor=loss.loss_normalizing_factor,
      default_decoder_params=models.DecoderParams(num_decodes=beams),
    )


def _search(
  decoder: decoding.GreedyDecoder | decoding.BeamSearch | None,
) -> tuple[int, Callable[..., Any]]:
  """Returns the beams, and T5X's function that does the same."""
  if isinstance(decoder, decoding.BeamSearch):
    search = functools.partial(t5x_decoding.beam_search, alpha=decoder.alpha)
    return decoder.num_beams, search
  # T5X's beam search of one beam is not greedy: it goes on behind an end token,
  # in search of a better one.
  greedy = functools.partial(t5x_decoding.temperature_sample, temperature=0.0)
  return 1, greedy


def t5x_own(like: network_lib.Transformer) -> nn.Module:
  """Returns T5X's own T5 1.1 of the same sizes; see gin/t5x/t5x_network.gin.

  Raises:
    SystemExit: it has no such adapter.
  """
  if adapters.of(like).added:
    raise SystemExit(
      f"error: T5X's own network has no {type(adapters.of(like)).__name__}: "
      'leave gin/t5x/t5x_network.gin out'
    )
  names = {field.name for field in dataclasses.fields(t5x_network.T5Config)}
  return t5x_network.Transformer(
    t5x_network.T5Config(
      **{
        name: value
        for name, value in vars(like.config).items()
        if name in names
      }
    )
  )
