"""T5X's model of our network, and its encoder-decoder model."""

from collections.abc import Callable, Mapping
import dataclasses
import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import seqio
from t5x import decoding as t5x_decoding
from t5x import models
from t5x import optimizers
from t5x.examples.t5 import network as t5x_network

from dst_t5x.core import stacking
from dst_t5x.engine import losses
from dst_t5x.models import api
from dst_t5x.models import decoding
from dst_t5x.models import families
from dst_t5x.models.t5 import converter
from dst_t5x.models.t5 import network as network_lib
from dst_t5x.t5x import decoder_only

_CAUSAL = 'CAUSAL_LM'  # PEFT's name of tasks that go on with a text.


class EncoderDecoderModel(models.EncoderDecoderModel):
  """T5X's model, with the arguments that this package's gin files have.

  Its computation is that of T5X's model.
  """

  def __init__(
    self,
    network: api.Network,
    task: str,
    optimizer: optimizers.OptimizerDef | None = None,
    decoder: decoding.GreedyDecoder | decoding.BeamSearch | None = None,
    loss: losses.Loss | None = None,
  ) -> None:
    """Makes the model.

    Args:
      network: a network of this package, or T5X's own; may have an adapter.
      task: the task whose vocabularies the model has.
      optimizer: an optimizer of T5X; None for evaluation and inference.
      decoder: `decoding.GreedyDecoder` or `decoding.BeamSearch`, replaced by
        T5X's own equivalent; greedy by default.
      loss: the settings of T5X's loss.
    """
    loss = loss or losses.Loss()
    features = seqio.get_mixture_or_task(task).output_features
    beams, decode = _search(decoder)
    super().__init__(
      module=_WithAdapter(network) if network.adapter.added else network,
      input_vocabulary=features['inputs'].vocabulary,
      output_vocabulary=features['targets'].vocabulary,
      optimizer_def=optimizer,
      decode_fn=decode,
      feature_converter_cls=functools.partial(
        converter.FeatureConverter, network.adapter.prefix(network.vocab_size)
      ),
      label_smoothing=loss.label_smoothing,
      z_loss=loss.z_loss,
      loss_normalizing_factor=loss.loss_normalizing_factor,
      default_decoder_params=models.DecoderParams(num_decodes=beams),
    )


def model(
  network: api.Network,
  task: str,
  feature_lengths: Mapping[str, int],
  optimizer: optimizers.OptimizerDef | None = None,
  decoder: Any = None,
  loss: losses.Loss | None = None,
) -> models.BaseTransformerModel:
  """Returns T5X's model for a network.

  Args:
    network: a network of this package, or T5X's own; may have an adapter.
    task: the task whose vocabularies the model has.
    feature_lengths: feature -> longest length; targets are decoded so far.
    optimizer: an optimizer of T5X; None for evaluation and inference.
    decoder: a decoder of `decoding`; greedy by default.
    loss: the settings of T5X's loss.
  """
  shapes = api.shapes(network.base)
  unstacked = jax.eval_shape(stacking.unstack_layers, shapes)
  loss = loss or losses.Loss()
  if families.of(unstacked).task_type != _CAUSAL:
    return EncoderDecoderModel(network, task, optimizer, decoder, loss)
  return decoder_only.DecoderOnlyModel(
    network,
    task,
    optimizer,
    decoder or decoding.GreedyDecoder(),
    loss,
    feature_lengths['targets'],
  )


def _search(
  decoder: decoding.GreedyDecoder | decoding.BeamSearch | None,
) -> tuple[int, Callable[..., Any]]:
  """Returns the number of beams, and T5X's function equivalent to a decoder."""
  if isinstance(decoder, decoding.BeamSearch):
    search = functools.partial(t5x_decoding.beam_search, alpha=decoder.alpha)
    return decoder.num_beams, search
  # T5X's beam search with one beam is not greedy: it continues after an end
  # token to search for a better sequence.
  greedy = functools.partial(t5x_decoding.temperature_sample, temperature=0.0)
  return 1, greedy


class _WithAdapter:
  """A network's module whose `init` and `apply` run with its adapter."""

  def __init__(self, network: api.Network) -> None:
    self._module: Any = network.base
    self._intercept = network.adapter.intercept

  def __getattr__(self, name: str) -> Any:
    return getattr(self._module, name)

  def init(self, *args: Any, **kwargs: Any) -> Any:
    """See `nn.Module.init`."""
    with nn.intercept_methods(self._intercept):
      return self._module.init(*args, **kwargs)

  def apply(self, *args: Any, **kwargs: Any) -> Any:
    """See `nn.Module.apply`."""
    with nn.intercept_methods(self._intercept):
      return self._module.apply(*args, **kwargs)


class OwnNetwork(t5x_network.Transformer, api.Network):
  """T5X's own T5 1.1, with the parts of the model contract that T5X needs."""

  @property
  def vocab_size(self) -> int:
    """See `api.Network`."""
    return self.config.vocab_size

  @property
  def scan_layers(self) -> bool:
    """See `api.Network`."""
    return False

  @nn.nowrap
  def initialize(self, key: jax.Array) -> Any:
    """See `api.Network`."""
    tokens = jnp.ones((1, 2), jnp.int32)
    return self.init(key, tokens, tokens, tokens, enable_dropout=False)


def t5x_own(like: network_lib.Transformer) -> OwnNetwork:
  """Returns T5X's own T5 1.1 with the sizes of a network of ours.

  See gin/t5x/t5x_network.gin.
  """
  names = {field.name for field in dataclasses.fields(t5x_network.T5Config)}
  settings = vars(like.config).items()
  return OwnNetwork(
    t5x_network.T5Config(**{k: v for k, v in settings if k in names})
  )
