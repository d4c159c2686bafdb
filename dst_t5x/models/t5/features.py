"""The features that T5 1.1 reads: names, lengths and cost."""

from collections.abc import Mapping
from typing import Any

from dst_t5x.models import api

# The features that the network reads. Only packed rows have the last four.
INPUTS = (
  'encoder_input_tokens',
  'decoder_input_tokens',
  'decoder_target_tokens',
  'encoder_segment_ids',
  'decoder_segment_ids',
  'encoder_positions',
  'decoder_positions',
)
# Stack -> the task's feature that it reads.
_STACKS = {'encoder': 'inputs', 'decoder': 'targets'}


def batch_shapes(
  feature_lengths: Mapping[str, int], rows: int, pack: bool
) -> api.Shapes:
  """See `api.Network.batch_shapes`."""
  inputs, targets = feature_lengths['inputs'], feature_lengths['targets']
  lengths = {
    'encoder_input_tokens': inputs,
    'decoder_input_tokens': targets,
    'decoder_target_tokens': targets,
    'decoder_loss_weights': targets,
  }
  if pack:
    for stack, feature in _STACKS.items():
      length = feature_lengths[feature]
      lengths[f'{stack}_segment_ids'] = lengths[f'{stack}_positions'] = length
  return {name: (rows, length) for name, length in lengths.items()}


def work_of_example(
  shapes: Mapping[str, Any], feature_lengths: Mapping[str, int]
) -> api.Work:
  """See `api.Network.work_of_example`."""
  lengths = {stack: feature_lengths[name] for stack, name in _STACKS.items()}
  products = sum(
    lengths[path.split('/')[0]] * leaf.size
    for path, leaf in shapes.items()
    # Embeddings are looked up, and vectors cost next to nothing.
    if path.split('/')[0] in lengths and len(leaf.shape) > 1
  )
  return api.Work(sum(lengths.values()), products)
