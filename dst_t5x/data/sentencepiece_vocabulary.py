"""Vocabularies of SentencePiece models: T5's and Gemma's.

T5's tasks use 100 sentinels (`<extra_id_0>` …) that its model file lacks. A
model file with a token that begins texts, such as Gemma's `<bos>`, is complete
and gets no sentinels.
"""

from collections.abc import Mapping
import contextlib
import functools
import re
import tempfile
from typing import Any

from dst_t5x.runtime import quiet_tensorflow  # noqa: F401

# isort: split
from etils import epath
from sentencepiece import sentencepiece_model_pb2
import seqio

from dst_t5x.core import object_stores

EXTRA_IDS = 100
# Protocol buffers make their classes when they are imported.
_MODEL: Any = getattr(sentencepiece_model_pb2, 'ModelProto')  # noqa: B009


class SentencePieceVocabulary(seqio.SentencePieceVocabulary):
  """A model file, which may be in an object store; it is read on first use."""

  _model: Any

  def __init__(self, path: str) -> None:
    """Takes the path of a model file."""
    super().__init__(path, extra_ids=EXTRA_IDS)

  @property
  def folder(self) -> epath.Path:
    """The folder of the file."""
    return epath.Path(self.sentencepiece_model_file).parent

  def _model_context(self) -> Any:
    if not self._model:
      with _local(self.sentencepiece_model_file) as path:
        complete = seqio.SentencePieceVocabulary(path)
        if complete.bos_id < 0:
          complete = seqio.SentencePieceVocabulary(path, EXTRA_IDS)
        self._model = complete._model_context()
    return self._model

  @property
  def extra_ids(self) -> int:
    """The number of sentinels."""
    return EXTRA_IDS if self.begin_id is None else 0

  @property
  def begin_id(self) -> int | None:
    """The token before every text; None for none."""
    return None if self.bos_id < 0 else self.bos_id

  @property
  def special_tokens(self) -> Mapping[str, str]:
    """`bos_token` and `eos_token`, as chat templates call them."""
    ids = {'bos_token': self.bos_id, 'eos_token': self.eos_id}
    return {
      name: self.tokenizer.IdToPiece(number)
      for name, number in ids.items()
      if number >= 0
    }

  @functools.cached_property
  def control_tokens(self) -> Mapping[str, int]:
    """Text -> id of the tokens that are no pieces of ordinary texts."""
    model, piece = _MODEL.FromString(self.sp_model), _MODEL.SentencePiece
    kinds = (piece.CONTROL, piece.USER_DEFINED)
    return {p.piece: i for i, p in enumerate(model.pieces) if p.type in kinds}

  def encode_marked(self, text: str) -> list[int]:
    """Returns the ids of a text that may have the names of control tokens."""
    names = '|'.join(map(re.escape, sorted(self.control_tokens, reverse=True)))
    ids: list[int] = []
    for part in re.split(f'({names})', text) if names else [text]:
      number = self.control_tokens.get(part)
      ids += self.tokenizer.EncodeAsIds(part) if number is None else [number]
    return ids

  def __getstate__(self) -> dict[str, Any]:
    state = super().__getstate__()
    state.pop('control_tokens', None)
    return state


@contextlib.contextmanager
def _local(path: str) -> Any:
  """Gives a file on the disk: seqio's TensorFlow cannot read s3://."""
  if not object_stores.is_remote(path):
    yield path
    return
  content = object_stores.read_bytes(epath.Path(path))
  with tempfile.NamedTemporaryFile() as file:
    file.write(content)
    file.flush()
    yield file.name
