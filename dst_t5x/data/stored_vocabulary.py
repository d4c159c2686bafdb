"""A task's vocabulary beside stored batches, which is used without seqio.

It does what `seqio.Vocabulary` does with the ids of a prediction. The files are
SentencePiece's model, sentinels included, or Hugging Face's `tokenizer.json`;
bytes need none.
"""

from collections.abc import Iterable, Mapping, Sequence
import functools
from typing import Any

from etils import epath
import sentencepiece
import tokenizers

from dst_t5x.core.errors import UserError
from dst_t5x.data import batch_files

BYTES, PIECES, TOKENIZER, CHAT = 'bytes', 'sentencepiece', 'tokenizer', 'chat'
_FILES = {PIECES: 'vocabulary.model', TOKENIZER: 'vocabulary.json'}
_FIRST_BYTE, _BYTES = 3, 256  # Ids 0, 1 and 2 are padding, the end, unknown.


def store(
  folder: epath.Path, content: Mapping[str, Any], model: bytes | None = None
) -> dict[str, Any]:
  """Writes a vocabulary; returns its entry in `batches.json`.

  Args:
    folder: of the batches.
    content: `kind`, `vocab_size`, `base_size`, `eos_id`, `unk_id`, and of a
      chat the `space` before an answer.
    model: the content of the file that the kind has.
  """
  if model is None:
    return dict(content)
  name = _FILES[content['of'] if content['kind'] == CHAT else content['kind']]
  return {**content, 'file': batch_files.write(folder, name, model)}


class StoredVocabulary:
  """The vocabulary of the targets."""

  def __init__(self, folder: epath.Path, entry: Mapping[str, Any]) -> None:
    """Takes the vocabulary's entry in `batches.json`; reads no file yet."""
    self._folder = folder
    self._entry = entry
    self._kind = entry['of'] if entry['kind'] == CHAT else entry['kind']

  def check(self) -> None:
    """Raises UserError if the file is missing or has another size."""
    if 'file' in self._entry:
      batch_files.check(self._folder, self._entry['file'])

  @property
  def vocab_size(self) -> int:
    """The number of ids."""
    size: int = self._entry['vocab_size']
    return size

  @functools.cached_property
  def _model(self) -> Any:
    content = batch_files.read(self._folder, self._entry['file'])
    if self._kind == PIECES:
      model = sentencepiece.SentencePieceProcessor()
      model.LoadFromSerializedProto(content)
      return model
    tokenizer = tokenizers.Tokenizer.from_str(content.decode())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer

  def encode(self, text: str) -> list[int]:
    """Returns the ids of a text, without an end token.

    Raises:
      UserError: texts are put into a chat template, or the file is damaged.
    """
    if self._entry['kind'] == CHAT:
      raise UserError(
        'stored batches have no chat template, so that no prompt can start as a'
        ' text: start it at random, or train from the task'
      )
    if self._kind == BYTES:
      return [byte + _FIRST_BYTE for byte in text.encode()]
    if self._kind == PIECES:
      return list(self._model.EncodeAsIds(text))
    return list(self._model.encode(text, add_special_tokens=False).ids)

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text of ids up to the first end token."""
    entry, found = self._entry, list(map(int, ids))
    unknown, end = entry['unk_id'], entry['eos_id']
    if unknown is not None:
      found = [unknown if i >= entry['base_size'] else i for i in found]
    if end is not None and end in found:
      found = found[: found.index(end) + 1]
    if entry['kind'] != CHAT:
      return self._decode(found)
    found = [i for i in found if i != end]
    return self._decode(found).removeprefix(entry['space'])

  def _decode(self, ids: Sequence[int]) -> str:
    if self._kind == BYTES:
      of_bytes = range(_FIRST_BYTE, _FIRST_BYTE + _BYTES)
      content = bytes(i - _FIRST_BYTE for i in ids if i in of_bytes)
      return content.decode(errors='ignore')
    if self._kind == PIECES:
      size, unknown = self._model.GetPieceSize(), self._model.unk_id()
      known = [i if i < size else unknown for i in ids]
      return str(self._model.DecodeIds(known))
    return str(self._model.decode(list(ids), skip_special_tokens=True))
