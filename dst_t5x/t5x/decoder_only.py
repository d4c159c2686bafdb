"""T5X's decoder-only model, made from our network, decoder and loss."""

from collections.abc import Mapping, MutableMapping
import functools
from typing import Any

import flax
import jax
import jax.numpy as jnp
import seqio
from t5x import models
from t5x import optimizers

from dst_t5x.engine import evaluation
from dst_t5x.engine import losses
from dst_t5x.models import api

PyTree = Any
Array = jax.Array


class DecoderOnlyModel(models.DecoderOnlyModel):
  """T5X's model, with the arguments that this package's gin files have.

  Its loss is that of T5X's model. It decodes by this package's decoders: T5X's
  take token 0 for padding and for the end, which is a real token here.
  """

  def __init__(
    self,
    network: api.Network,
    task: str,
    optimizer: optimizers.OptimizerDef | None,
    decoder: evaluation.Decoder,
    loss: losses.Loss,
    max_decode_length: int,
  ) -> None:
    """Makes the model.

    Args:
      network: a decoder-only network of this package; may have an adapter.
      task: the task whose vocabulary the model has.
      optimizer: an optimizer of T5X; None for evaluation and inference.
      decoder: a decoder of `decoding`.
      loss: the settings of T5X's loss.
      max_decode_length: number of tokens after which decoding ends.
    """
    features = seqio.get_mixture_or_task(task).output_features
    super().__init__(
      module=network,
      vocabulary=features['targets'].vocabulary,
      optimizer_def=optimizer,
      feature_converter_cls=functools.partial(_converter, network),
      label_smoothing=loss.label_smoothing,
      z_loss=loss.z_loss,
      loss_normalizing_factor=loss.loss_normalizing_factor,
    )
    self._network = network
    self._decoder = decoder
    self._max_decode_length = max_decode_length

  def get_initial_variables(
    self,
    rng: Array,
    input_shapes: Mapping[str, Any],
    input_types: Mapping[str, Any] | None = None,
  ) -> Any:
    """See `models.BaseModel`; shapes of parameters follow from the network."""
    del input_shapes, input_types
    return flax.core.freeze(self._network.initialize(rng))

  def _compute_logits(
    self,
    params: PyTree,
    batch: Mapping[str, Array],
    dropout_rng: Array | None = None,
    mutable: Any = False,
    other_variables: PyTree | None = None,
  ) -> Array:
    """Returns float32 logits `[batch, length, vocab]`."""
    if mutable or other_variables:
      raise ValueError('this network has no variables but its parameters')
    return self._network.logits(params, batch, dropout_rng)

  def predict_batch_with_aux(
    self,
    params: PyTree,
    batch: Mapping[str, Array],
    rng: Array | None = None,
    *,
    return_all_decodes: bool = False,
    num_decodes: int = 1,
    decoder_params: MutableMapping[str, Any] | None = None,
  ) -> tuple[Array, Mapping[str, Array]]:
    """Returns the tokens after the prompts, `[batch, max_decode_length]`.

    Args:
      params: the model's parameters.
      batch: features of the network's converter, not packed.
      rng: unused; `decoding.Sampling` has a seed of its own.
      return_all_decodes: must be False.
      num_decodes: must be 1; `decoding.BeamSearch` has its number of beams.
      decoder_params: must be empty: gin sets the decoder.

    Raises:
      ValueError: an argument asks for what the decoder decides.
    """
    del rng
    if return_all_decodes or num_decodes != 1 or decoder_params:
      raise ValueError('set DECODER to choose how sequences are decoded')
    is_prompt = batch['decoder_causal_attention'] > 0
    tokens, scores = self._decoder(
      self._network,
      params,
      jnp.where(is_prompt, batch['decoder_input_tokens'], self._network.pad_id),
      self._max_decode_length,
    )
    return tokens, {'scores': scores}


def _converter(
  network: api.Network, pack: bool = True, **options: Any
) -> seqio.FeatureConverter:
  """Returns the network's own converter; the options are of T5's packing."""
  del options
  return network.feature_converter(pack)
