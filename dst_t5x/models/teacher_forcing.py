"""Logits and targets of the networks whose features are named as T5X's."""

from typing import Any, ClassVar

import jax

from dst_t5x.models import api

Array = jax.Array


class TeacherForced(api.Network):
  """A Flax module that maps features to logits; a subclass says which.

  Attributes:
    inputs: names of the features that a call takes; packed batches have all.
  """

  inputs: ClassVar[tuple[str, ...]]
  apply: Any  # Flax's.

  def logits(
    self, params: Any, batch: api.Batch, dropout_key: Array | None = None
  ) -> Array:
    """See `api.Network`."""
    logits: Array = self.apply(
      {'params': params},
      **{name: batch[name] for name in self.inputs if name in batch},
      enable_dropout=dropout_key is not None,
      rngs=None if dropout_key is None else {'dropout': dropout_key},
    )
    return logits

  def targets(self, batch: api.Batch) -> api.Targets:
    """See `api.Network`."""
    return api.Targets(
      batch['decoder_target_tokens'],
      batch['decoder_loss_weights'],
      batch.get('decoder_segment_ids'),
    )
