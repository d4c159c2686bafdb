"""Texts to tokens and back, as `infer` does it."""

import re

import numpy as np
import seqio

from dst_t5x.core.errors import UserError
from dst_t5x.data import vocabulary as vocabulary_lib
from dst_t5x.models import api

# More for each piece than text of any language has: T5's longest has 16.
_CHARACTERS = 64
_SURROGATE = re.compile('[\ud800-\udfff]')


class Texts:
  """A vocabulary, and how long an input may be."""

  def __init__(self, vocabulary: seqio.Vocabulary, input_length: int) -> None:
    """Reads the vocabulary.

    Args:
      vocabulary: of inputs and targets.
      input_length: pieces of an input, with the end token.

    Raises:
      UserError: the vocabulary cannot be read.
    """
    vocabulary_lib.check(vocabulary)
    self._vocabulary = vocabulary
    self._input_length = input_length

  def check_fits(self, network: api.Network) -> None:
    """Raises UserError if the model lacks an embedding for an id."""
    feature = seqio.Feature(self._vocabulary)
    vocabulary_lib.check_fits({'inputs': feature}, network.vocab_size)

  def encode(self, text: str) -> np.ndarray:
    """Returns int32 [length], with the end token.

    Raises:
      UserError: it is no text, or too long; nothing is cut.
    """
    most = _CHARACTERS * self._input_length
    # Before any work, which takes some 20 bytes for each.
    if len(text) > most:
      raise UserError(
        f'an input has {len(text):,} characters, more than the {most:,} that'
        f' this server takes: {_CHARACTERS} for each of {self._input_length}'
        ' pieces'
      )
    if _SURROGATE.search(text):
      raise UserError(
        'an input has half of a surrogate pair, which is no character'
      )
    tokens = [*self._vocabulary.encode(text), self._vocabulary.eos_id]
    if len(tokens) > self._input_length:
      raise UserError(
        f'an input has {len(tokens)} pieces, more than the'
        f' {self._input_length} that this server takes'
      )
    return np.array(tokens, np.int32)

  def decode(self, tokens: np.ndarray) -> str:
    """Returns the text of int32 [length]; 0 is padding."""
    return self._vocabulary.decode([int(t) for t in tokens])
