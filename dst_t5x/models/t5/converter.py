"""The seqio feature converter of T5."""

from collections.abc import Mapping, Sequence
from typing import Any

import seqio
import tensorflow as tf


class FeatureConverter(seqio.EncDecFeatureConverter):
  """Makes T5's features, with a prefix before the inputs of every example.

  The prefix comes on top of the inputs' length. In a packed row, each example
  has the prefix.
  """

  def __init__(self, prefix: Sequence[int] = (), **options: Any) -> None:
    """See `api.Network.feature_converter`; `options` are seqio's."""
    super().__init__(**options)
    self._prefix = tuple(prefix)

  def _longer(self, lengths: Mapping[str, int]) -> dict[str, int]:
    return {**lengths, 'inputs': lengths['inputs'] + len(self._prefix)}

  def _convert_features(
    self, ds: tf.data.Dataset, task_feature_lengths: Mapping[str, int]
  ) -> tf.data.Dataset:
    if not self._prefix:
      return super()._convert_features(ds, task_feature_lengths)

    def put_before(example: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
      prefix = tf.constant(self._prefix, example['inputs'].dtype)
      return {**example, 'inputs': tf.concat([prefix, example['inputs']], 0)}

    return super()._convert_features(
      ds.map(put_before), self._longer(task_feature_lengths)
    )

  def get_model_feature_lengths(
    self, task_feature_lengths: Mapping[str, int]
  ) -> Mapping[str, int]:
    """Returns the lengths of the model's features, with the prefix."""
    return super().get_model_feature_lengths(self._longer(task_feature_lengths))
