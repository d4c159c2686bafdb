"""The vocabulary of all tasks: T5's by default.

T5's vocabulary has 32,000 SentencePiece pieces and 100 sentinels
(`<extra_id_0>` …). The public checkpoints pad it to 32,128 rows. Machines that
cannot read Google Cloud Storage use a local copy of the model file, named by
the environment variable `DST_VOCABULARY` or by gin (`--gin.VOCABULARY=…`). The
name `bytes` stands for the 256 bytes of UTF-8, for small models. A folder with
Hugging Face's `tokenizer.json` and `tokenizer_config.json` is read as well, and
so is one with a SentencePiece model, `tokenizer.model`.

With a chat template, the inputs of every task become messages of a user, and
the targets answers; see `chat_vocabulary`.
"""

import functools
import os
from typing import TYPE_CHECKING

from etils import epath
import gin

from dst_t5x.core import hub
from dst_t5x.core import object_stores
from dst_t5x.core import stable_ids
from dst_t5x.core import values
from dst_t5x.core.errors import UserError

if TYPE_CHECKING:
  import seqio

  from dst_t5x.data import chat_vocabulary

VOCABULARY_VARIABLE = 'DST_VOCABULARY'
PUBLIC_PATH = 'gs://t5-data/vocabs/cc_all.32000.100extra/sentencepiece.model'
BYTES = 'bytes'
_SENTENCEPIECE = 'tokenizer.model'


@gin.configurable
@stable_ids.called('vocabulary')
def chosen(
  name: values.Path | None = None, chat_template: bool = False
) -> 'seqio.Vocabulary':
  """Returns the vocabulary, which reads its file on first use; see `check`.

  Args:
    name: path of a SentencePiece model, of a folder with `tokenizer.json` or of
      that file, `hf://organisation/name[@revision]`, or `bytes`; by default the
      value of `DST_VOCABULARY`, or the public path.
    chat_template: whether texts are messages in the chat template of the
      folder; see `chat_vocabulary`.
  """
  found = name or os.environ.get(VOCABULARY_VARIABLE) or PUBLIC_PATH
  return _make_chat(found) if chat_template else _make(found)


@functools.cache
def _make(name: str) -> 'seqio.Vocabulary':
  # seqio is not imported above: a model's gin file is read without it, too.
  from dst_t5x.data import sentencepiece_vocabulary
  from dst_t5x.data import tokenizers_vocabulary

  # isort: split
  import seqio

  if name == BYTES:
    return seqio.ByteVocabulary()
  if hub.is_path(name):
    return _make(os.fspath(hub.snapshot(name)[0]))
  path = epath.Path(name)
  if not object_stores.is_remote(name) and path.is_dir():
    has_other = (path / tokenizers_vocabulary.FILE).exists()
    if (path / _SENTENCEPIECE).exists() and not has_other:
      return _make(os.fspath(path / _SENTENCEPIECE))
    return tokenizers_vocabulary.TokenizersVocabulary(name)
  if name.endswith('.json'):
    return tokenizers_vocabulary.TokenizersVocabulary(name)
  if name.endswith('.gguf'):
    raise UserError(
      f'{name} cannot be the vocabulary: write its tokenizer.json with `python'
      ' -m dst_t5x.convert FILE.gguf FOLDER --format=hf`, and name that folder'
    )
  return sentencepiece_vocabulary.SentencePieceVocabulary(name)


@functools.cache
def _make_chat(name: str) -> 'chat_vocabulary.ChatVocabulary':
  from dst_t5x.data import chat_vocabulary

  return chat_vocabulary.ChatVocabulary(_make(name))
