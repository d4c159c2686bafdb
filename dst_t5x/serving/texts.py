"""Converts texts to tokens and back, as `infer` does."""

from collections.abc import Iterable, Sequence
import functools
import re

import numpy as np
import seqio

from dst_t5x.core.errors import UserError
from dst_t5x.data import chat_vocabulary
from dst_t5x.data import task_vocabulary
from dst_t5x.models import api

# The most characters per piece. T5's longest piece has 16.
_CHARACTERS = 64
_SURROGATE = re.compile('[\ud800-\udfff]')


class Texts:
  """A vocabulary and the greatest length of an input."""

  def __init__(self, vocabulary: seqio.Vocabulary, input_length: int) -> None:
    """Reads the vocabulary.

    Args:
      vocabulary: the vocabulary of inputs and targets.
      input_length: the most pieces of an input, with the end token.

    Raises:
      UserError: the vocabulary cannot be read.
    """
    task_vocabulary.check(vocabulary)
    self._vocabulary = vocabulary
    self._input_length = input_length

  def check_fits(self, network: api.Network) -> None:
    """Checks that the model has the vocabulary's tokens.

    Raises:
      UserError: it has too few, or texts begin or end with other ones.
    """
    feature = seqio.Feature(self._vocabulary)
    task_vocabulary.check_fits({'inputs': feature}, network.vocab_size)
    task_vocabulary.check_special(
      {'targets': feature}, network.eos_id, network.begin_id
    )

  def encode(self, text: str) -> np.ndarray:
    """Returns the tokens of a text with the end token, int32 [length].

    This is the feature `inputs` of a task, from which the network makes its
    prompt; see `api.Network.prompt_of_inputs`.

    Raises:
      UserError: the text has a lone surrogate, or is too long. It is never
        truncated.
    """
    most = _CHARACTERS * self._input_length
    # Checked first: tokenization takes some 20 bytes per character.
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
    return self._checked(tokens)

  def of_ids(self, ids: Sequence[int]) -> np.ndarray:
    """Returns a text that is already tokenized, as `encode`.

    Raises:
      UserError: an id is no token's, or there are too many.
    """
    size = self._vocabulary.vocab_size
    for number in ids:
      if not 0 <= number < size:
        raise UserError(
          f'an input has the token {number}, but the vocabulary ends at'
          f' {size - 1}'
        )
    return self._checked([*ids, self._vocabulary.eos_id])

  def _checked(self, tokens: Sequence[int]) -> np.ndarray:
    if len(tokens) > self._input_length:
      raise UserError(
        f'an input has {len(tokens)} pieces, more than the'
        f' {self._input_length} that this server takes: shorten it, or start'
        ' the server with a larger --input-length'
      )
    return np.array(tokens, np.int32)

  def decode(self, tokens: Iterable[int]) -> str:
    """Returns the text of tokens, int32 [length], up to the end token."""
    return self._vocabulary.decode([int(t) for t in tokens])

  def piece(self, number: int) -> str:
    """Returns the text of one token."""
    return self.plain.decode([number])

  @functools.cached_property
  def plain(self) -> 'Texts':
    """Texts that are put into no chat template."""
    if not isinstance(self._vocabulary, chat_vocabulary.ChatVocabulary):
      return self
    return Texts(self._vocabulary.base, self._input_length)

  @functools.cached_property
  def chat(self) -> 'Texts':
    """Texts that are conversations; see `conversations.to_text`.

    Raises:
      UserError: there is no chat template, or it is damaged.
    """
    if isinstance(self._vocabulary, chat_vocabulary.ChatVocabulary):
      return self
    chat = chat_vocabulary.ChatVocabulary(self._vocabulary)
    return Texts(chat, self._input_length)

  @property
  def eos_id(self) -> int | None:
    """The token that ends a text, or a turn of the assistant."""
    return self._vocabulary.eos_id

  @property
  def begin_id(self) -> int | None:
    """The token before every text; None for none."""
    return getattr(self._vocabulary, 'begin_id', None)
