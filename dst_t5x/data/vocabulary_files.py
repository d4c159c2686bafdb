"""What is stored of a seqio vocabulary; see `stored_vocabulary`."""

from typing import Any

from dst_t5x.runtime import quiet_tensorflow  # noqa: F401

# isort: split
import seqio

from dst_t5x.core import object_stores
from dst_t5x.core.errors import UserError
from dst_t5x.data import chat_vocabulary
from dst_t5x.data import stored_vocabulary
from dst_t5x.data import tokenizers_vocabulary


def content_of(
  task: str, vocabulary: seqio.Vocabulary
) -> tuple[dict[str, Any], bytes | None]:
  """Returns the entry of a vocabulary, and the content of its file.

  Args:
    task: the task's name, for messages.
    vocabulary: that of its targets.

  Raises:
    UserError: it is of a class that cannot be stored.
  """
  if isinstance(vocabulary, chat_vocabulary.ChatVocabulary):
    base, model = content_of(task, vocabulary.base)
    chat = {'of': base['kind'], 'space': vocabulary.space}
    kind = stored_vocabulary.CHAT
  elif isinstance(vocabulary, seqio.ByteVocabulary):
    kind, model, chat = stored_vocabulary.BYTES, None, {}
  elif isinstance(vocabulary, seqio.SentencePieceVocabulary):
    kind, model, chat = stored_vocabulary.PIECES, vocabulary.sp_model, {}
  elif isinstance(vocabulary, tokenizers_vocabulary.TokenizersVocabulary):
    file = vocabulary.folder / tokenizers_vocabulary.FILE
    model = object_stores.read_bytes(file)
    kind, chat = stored_vocabulary.TOKENIZER, {}
  else:
    raise UserError(
      f'the vocabulary of task {task!r} is a {type(vocabulary).__name__}, which'
      ' cannot be stored: use bytes, a SentencePiece model or a tokenizer.json'
    )
  content = {
    'kind': kind,
    'eos_id': vocabulary.eos_id,
    'unk_id': vocabulary.unk_id,
    'base_size': vocabulary._base_vocab_size,
    **chat,
  }
  return content, model
