"""The features of decoder-only networks, made by seqio.

seqio's own converter takes id 0 for padding, begins every row with it, and
packs by counting what is not 0. Here tokens have a code while rows are packed
and padded, twice the id above them and a flag, so that 0 is padding and nothing
else.
"""

from collections.abc import Mapping
from typing import Any

import seqio
import tensorflow as tf

from dst_t5x.models.decoder_only import features

_SPEC = seqio.FeatureConverter.FeatureSpec(dtype=tf.int32)


class FeatureConverter(seqio.FeatureConverter):
  """Makes rows of inputs and targets, with loss on the targets only."""

  TASK_FEATURES: Mapping[str, Any] = {'inputs': _SPEC, 'targets': _SPEC}
  MODEL_FEATURES: Mapping[str, Any] = {
    'decoder_input_tokens': _SPEC,
    'decoder_target_tokens': _SPEC,
    'decoder_loss_weights': _SPEC,
    'decoder_causal_attention': _SPEC,
  }
  PACKING_FEATURE_DTYPES: Mapping[str, Any] = {
    'decoder_segment_ids': tf.int32,
    'decoder_positions': tf.int32,
  }

  def __init__(self, layout: features.Layout, **options: Any) -> None:
    """Takes how an example becomes a row; see `api.Network`."""
    # As of T5: seqio's checks of the lengths take long to trace.
    super().__init__(apply_length_check=False, **options)
    self._layout = layout

  def get_model_feature_lengths(
    self, task_feature_lengths: Mapping[str, int]
  ) -> Mapping[str, int]:
    """Returns the lengths of the model's features."""
    length = features.row_length(task_feature_lengths) + self._layout.added
    names = [*self.MODEL_FEATURES]
    names += self.PACKING_FEATURE_DTYPES if self.pack else []
    return dict.fromkeys(names, length)

  def _convert_features(
    self, ds: tf.data.Dataset, task_feature_lengths: Mapping[str, int]
  ) -> tf.data.Dataset:
    length = features.row_length(task_feature_lengths) + self._layout.added
    ds = ds.map(self._encode, num_parallel_calls=tf.data.AUTOTUNE)
    ds = self._pack_or_pad(ds, {'inputs': length, 'targets': length})
    return ds.map(self._decode, num_parallel_calls=tf.data.AUTOTUNE)

  def _encode(self, example: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    """Returns what is read, and what follows each of it, as codes."""
    inputs, targets = example['inputs'], example['targets']
    inputs = inputs[: tf.size(inputs) - self._ends(inputs)]
    prompt = tf.concat([tf.constant(self._layout.before, tf.int32), inputs], 0)
    tokens = tf.concat([prompt, targets], 0)
    is_target = tf.range(tf.size(tokens)) >= tf.size(prompt)
    # Nothing follows the last token. It is kept where there is room, because
    # an example without targets is all prompt.
    read = tf.size(tokens) - int(self.pack)
    return {
      'inputs': _code(tokens, ~is_target)[:read],
      'targets': _code(tokens, is_target)[1:],
    }

  def _ends(self, inputs: tf.Tensor) -> tf.Tensor:
    """Returns 1 if inputs end with an end token, 0 otherwise."""
    is_end = tf.equal(inputs[-1:], self._layout.eos_id)
    return tf.cast(tf.reduce_any(is_end), tf.int32)

  def _decode(self, codes: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    """Returns the network's features."""
    read, following = codes['inputs'], codes['targets']
    model_features = {
      'decoder_input_tokens': tf.maximum(read // 2 - 1, 0),
      'decoder_target_tokens': tf.maximum(following // 2 - 1, 0),
      'decoder_loss_weights': following % 2,
      'decoder_causal_attention': read % 2,
    }
    if self.pack:
      model_features['decoder_segment_ids'] = codes['inputs_segment_ids']
      model_features['decoder_positions'] = codes['inputs_positions']
    return model_features


def _code(tokens: tf.Tensor, flag: tf.Tensor) -> tf.Tensor:
  """Returns int32 codes above 0 of ids from 0 on."""
  return 2 * (tokens + 1) + tf.cast(flag, tf.int32)
