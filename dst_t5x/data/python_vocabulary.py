"""Vocabularies that encode in Python, made usable in seqio's pipelines."""

from typing import Any

from dst_t5x.runtime import quiet_tensorflow  # noqa: F401

# isort: split
import numpy as np
import seqio
import tensorflow as tf


class PythonVocabulary(seqio.Vocabulary):
  """A vocabulary whose `encode` and `decode` TensorFlow calls."""

  def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
    """Returns int32 `[length]`, or ragged `[…, length]` of several texts."""

    def encode(text: Any) -> np.ndarray:
      return np.array(self.encode(np.asarray(text).item().decode()), np.int32)

    if s.shape.rank:
      spec = tf.RaggedTensorSpec([None] * s.shape.rank, tf.int32)
      return tf.map_fn(self._encode_tf, s, fn_output_signature=spec)
    ids = tf.numpy_function(encode, [s], tf.int32, stateful=False)
    return tf.ensure_shape(ids, [None])

  def decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
    """Returns the texts `[…]` of ids `[…, length]`; see `decode`."""
    # Not seqio's, which fills up with id 0 behind an end token.
    if isinstance(ids, tf.RaggedTensor) or ids.shape.rank > 1:
      return tf.map_fn(self.decode_tf, ids, fn_output_signature=tf.string)

    def decode(row: Any) -> bytes:
      return self.decode(row.tolist()).encode()

    text = tf.numpy_function(decode, [ids], tf.string, stateful=False)
    return tf.ensure_shape(text, [])

  def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
    return self.decode_tf(ids)
