"""The SentencePiece vocabulary of the public T5 checkpoints.

32,000 pieces and 100 sentinels (`<extra_id_0>` …), which the public
checkpoints pad to 32,128 rows. The environment variable `DST_VOCABULARY` names
a local copy of the model file for machines that cannot read Google Cloud
Storage.
"""

import os
import threading

import seqio

from dst_t5x.errors import UserError

VOCABULARY_VARIABLE = 'DST_VOCABULARY'
PUBLIC_PATH = 'gs://t5-data/vocabs/cc_all.32000.100extra/sentencepiece.model'
EXTRA_IDS = 100
_SECONDS_TO_LOAD = 90.0


def t5_vocabulary() -> seqio.SentencePieceVocabulary:
  """Returns T5's vocabulary, which reads its file on first use; see `check`."""
  path = os.environ.get(VOCABULARY_VARIABLE) or PUBLIC_PATH
  return seqio.SentencePieceVocabulary(path, extra_ids=EXTRA_IDS)


def check(vocabulary: seqio.Vocabulary) -> None:
  """Loads a vocabulary, so that a missing file is missed before any work.

  Args:
    vocabulary: any seqio vocabulary; only SentencePiece ones read a file.

  Raises:
    UserError: the file is missing, unreachable, or not a SentencePiece model.
  """
  if not isinstance(vocabulary, seqio.SentencePieceVocabulary):
    return
  failure: list[BaseException] = []

  def load() -> None:
    try:
      vocabulary.load_model()
    except Exception as error:  # TensorFlow's, protobuf's or SentencePiece's.
      failure.append(error)

  # Without a network, Google Cloud Storage is retried for many minutes.
  loader = threading.Thread(target=load, daemon=True)
  loader.start()
  loader.join(_SECONDS_TO_LOAD)
  if loader.is_alive():
    reason = f'no answer in {_SECONDS_TO_LOAD:.0f} s'
  elif failure:
    reason = (str(failure[0]).splitlines() or [type(failure[0]).__name__])[0]
  else:
    return
  path = vocabulary.sentencepiece_model_file
  raise UserError(
    f'cannot read the vocabulary {path!r} ({reason}); set'
    f' {VOCABULARY_VARIABLE} to a local SentencePiece model'
  )
