"""A vocabulary of Hugging Face's `tokenizer.json`, for seqio.

seqio takes id 0 for padding; here it may be any token. Padding behind an end
token is cut off before decoding, as seqio does it, and there is no other.
"""

from collections.abc import Iterable, Sequence
import functools
from typing import Any

from etils import epath
import numpy as np
import seqio
import tensorflow as tf
import tokenizers

from dst_t5x.core import json_object
from dst_t5x.core import object_stores
from dst_t5x.core.errors import UserError, first_line

FILE = 'tokenizer.json'
_CONFIG = 'tokenizer_config.json'


class TokenizersVocabulary(seqio.Vocabulary):
  """What a folder with `tokenizer.json` and `tokenizer_config.json` says.

  Files are read on first use.
  """

  def __init__(self, path: str) -> None:
    """Takes a folder, or the path of its `tokenizer.json`."""
    super().__init__()
    folder = epath.Path(path)
    self.folder = folder.parent if folder.suffix == '.json' else folder

  @functools.cached_property
  def tokenizer(self) -> tokenizers.Tokenizer:
    """The tokenizer.

    Raises:
      UserError: the file is missing or damaged.
    """
    file = self.folder / FILE
    content = object_stores.read_bytes(file)
    try:
      tokenizer = tokenizers.Tokenizer.from_str(content.decode())
    except Exception as e:  # The library raises nothing more special.
      raise UserError(f'{file} is no tokenizer: {first_line(e)}') from e
    # Rows are cut and filled up elsewhere.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer

  @functools.cached_property
  def _special(self) -> dict[str, int]:
    """Name -> id of the special tokens that are there."""
    stated = json_object.read(self.folder / _CONFIG)
    found = {}
    for name in ('bos_token', 'eos_token', 'unk_token'):
      token = stated.content.get(name)
      # Older files have all properties of the token.
      text = token.get('content') if isinstance(token, dict) else token
      if text is None:
        continue
      number = (
        self.tokenizer.token_to_id(text) if isinstance(text, str) else None
      )
      if number is None:
        raise stated.refusal(name, f'must be a token of {FILE}')
      found[name] = number
    return found

  def load(self) -> None:
    """Reads the files.

    Raises:
      UserError: one is missing or damaged, or there is no end token.
    """
    if self.tokenizer and self.eos_id is None:
      raise UserError(f'{self.folder / _CONFIG} states no eos_token')

  @property
  def begin_id(self) -> int | None:
    """The token that the tokenizer puts before every text; None for none."""
    ids = self.tokenizer.encode('').ids
    return ids[0] if ids and ids[0] == self.bos_id else None

  @property
  def bos_id(self) -> int | None:
    """Id of the begin of a sequence; `begin_id` says whether it is in use."""
    return self._special.get('bos_token')

  @property
  def eos_id(self) -> int | None:
    """Id of the end of a sequence."""
    return self._special.get('eos_token')

  @property
  def unk_id(self) -> int | None:
    """Id of whatever the vocabulary does not know; None with bytes."""
    return self._special.get('unk_token')

  @functools.cached_property
  def _base_vocab_size(self) -> int:
    return max(self.tokenizer.get_vocab().values()) + 1

  def _encode(self, s: str) -> Sequence[int]:
    return self.tokenizer.encode(s, add_special_tokens=False).ids

  def _decode(self, ids: Iterable[int]) -> str:
    return self.tokenizer.decode(list(ids), skip_special_tokens=True)

  def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
    """Returns int32 `[length]`, or ragged `[…, length]` of several texts."""

    def encode(text: Any) -> np.ndarray:
      return np.array(self._encode(np.asarray(text).item().decode()), np.int32)

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

  def __eq__(self, other: Any) -> bool:
    return (
      isinstance(other, TokenizersVocabulary) and self.folder == other.folder
    )

  __hash__ = None  # type: ignore[assignment]
