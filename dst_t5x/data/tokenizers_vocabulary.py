"""A vocabulary of Hugging Face's `tokenizer.json`, for seqio.

seqio takes id 0 for padding; here it may be any token. Padding behind an end
token is cut off before decoding, as seqio does it, and there is no other.
"""

from collections.abc import Iterable, Mapping, Sequence
import functools
from typing import Any

from etils import epath
import tokenizers

from dst_t5x.core import json_object
from dst_t5x.core import object_stores
from dst_t5x.core.errors import UserError, first_line
from dst_t5x.data import python_vocabulary

FILE = 'tokenizer.json'
_CONFIG = 'tokenizer_config.json'
_TOKENS = frozenset(['bos_token', 'eos_token', 'unk_token'])


class TokenizersVocabulary(python_vocabulary.PythonVocabulary):
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
  def _stated(self) -> json_object.JsonObject:
    return json_object.read(self.folder / _CONFIG)

  @property
  def special_tokens(self) -> Mapping[str, str]:
    """Name -> text of the special tokens that are stated.

    Raises:
      UserError: the file is missing or damaged.
    """
    texts = {}
    for name in sorted(_TOKENS | {'pad_token'}):
      token = self._stated.content.get(name)
      # Older files have all properties of the token.
      text = token.get('content') if isinstance(token, dict) else token
      if text is not None:
        texts[name] = text
    return texts

  @functools.cached_property
  def _special(self) -> dict[str, int]:
    """Name -> id of the special tokens that are there."""
    found = {}
    for name in sorted(_TOKENS & self.special_tokens.keys()):
      text = self.special_tokens[name]
      number = (
        self.tokenizer.token_to_id(text) if isinstance(text, str) else None
      )
      if number is None:
        raise self._stated.refusal(name, f'must be a token of {FILE}')
      found[name] = number
    return found

  @functools.cached_property
  def control_tokens(self) -> Mapping[str, int]:
    """Text -> id of the tokens that are no pieces of ordinary texts."""
    added = self.tokenizer.get_added_tokens_decoder()
    return {token.content: number for number, token in added.items()}

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

  def piece(self, number: int) -> str:
    """Returns the name of an id, with `▁` for a space as SentencePiece has."""
    text = self.tokenizer.decode([number], skip_special_tokens=False)
    named = text.replace(' ', '▁').replace('\n', '\\n')
    return named or f'<{number}>'

  def encode_marked(self, text: str) -> Sequence[int]:
    """Returns the ids of a text that may have the names of control tokens."""
    return self._encode(text)

  def _decode(self, ids: Iterable[int]) -> str:
    return self.tokenizer.decode(list(ids), skip_special_tokens=True)

  def __eq__(self, other: Any) -> bool:
    return (
      isinstance(other, TokenizersVocabulary) and self.folder == other.folder
    )

  __hash__ = None  # type: ignore[assignment]
