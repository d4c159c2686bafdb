"""What a decoder-only network reads: names, order and lengths.

An example is one row of tokens: what comes before (placeholders of a trained
prompt, then the token that begins every example, where the model has one), its
inputs, its targets. The tasks end their inputs with an end token, as T5 wants
it; here targets go on where inputs stop, so that it is left out.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dst_t5x.core.errors import UserError
from dst_t5x.models import api
from dst_t5x.models.decoder_only.config import DecoderConfig

# In prompts; any id from 0 on may be a token.
PADDING = -1
# Those that the network reads; packed rows have the last two.
INPUTS = ('decoder_input_tokens', 'decoder_segment_ids', 'decoder_positions')


class Layout(NamedTuple):
  """How an example becomes a row.

  Attributes:
    before: ids that come before the inputs.
    eos_id: what inputs may end with, and is left out.
    added: how many placeholders there are, which make rows longer.
  """

  before: tuple[int, ...]
  eos_id: int
  added: int = 0

  @classmethod
  def of(cls, config: DecoderConfig, prefix: Sequence[int]) -> 'Layout':
    """Returns that of a network, with placeholders at the beginning."""
    begin = () if config.begin_id is None else (config.begin_id,)
    return cls((*prefix, *begin), config.eos_id, len(prefix))

  def prompt(self, inputs: np.ndarray) -> np.ndarray:
    """Returns what decoding starts from, int32 `[length]`.

    Args:
      inputs: int32 `[inputs length]`, padded with `PADDING`.
    """
    tokens = inputs[inputs != PADDING]
    if tokens.size and tokens[-1] == self.eos_id:
      tokens = tokens[:-1]
    row = np.full(len(self.before) + len(inputs), PADDING, np.int32)
    row[: len(self.before)] = self.before
    row[len(self.before) :][: len(tokens)] = tokens
    return row


def batch_shapes(
  config: DecoderConfig,
  feature_lengths: Mapping[str, int],
  rows: int,
  pack: bool,
) -> api.Shapes:
  """Returns feature -> [batch, length]; see `api.Network.batch_shapes`.

  Raises:
    UserError: a row is longer than the context.
  """
  length = row_length(feature_lengths)
  check_length(config, length, 'of inputs and targets')
  names = ['input_tokens', 'target_tokens', 'loss_weights', 'causal_attention']
  names += ['segment_ids', 'positions'] if pack else []
  return {f'decoder_{name}': (rows, length) for name in names}


def row_length(feature_lengths: Mapping[str, int]) -> int:
  """Returns how long a row is."""
  return feature_lengths['inputs'] + feature_lengths['targets']


def check_length(config: DecoderConfig, length: int, what: str) -> None:
  """Raises UserError if a row is longer than the context."""
  if length > config.context_length:
    raise UserError(
      f'a row of {length} tokens {what} is longer than the context of this'
      f' model, {config.context_length}: lower TASK_FEATURE_LENGTHS'
    )


def work_of_example(
  config: DecoderConfig,
  shapes: Mapping[str, Any],
  feature_lengths: Mapping[str, int],
) -> api.Work:
  """Returns what one example takes; see `api.Network.work_of_example`."""
  tokens = row_length(feature_lengths)
  # Scales and biases are as good as nothing; so is the table of embeddings,
  # where it is only looked up.
  weights = sum(
    leaf.size
    for path, leaf in shapes.items()
    if not path.endswith(('/scale', '/bias', '/embedding', '/prompt'))
  )
  if config.logits_via_embedding:
    weights += config.vocab_size * config.emb_dim
  return api.Work(tokens, tokens * weights)
