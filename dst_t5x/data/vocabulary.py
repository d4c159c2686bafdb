"""The vocabulary of all tasks here: T5's, unless another one is chosen.

T5's has 32,000 SentencePiece pieces and 100 sentinels (`<extra_id_0>` …), which
the public checkpoints pad to 32,128 rows. A local copy of the model file, for
machines that cannot read Google Cloud Storage, is named by the environment
variable `DST_VOCABULARY` or by gin (`--gin.VOCABULARY=…`), which also takes
`bytes`: the 256 bytes of UTF-8, for small models of one's own.
"""

from collections.abc import Callable, Mapping
import functools
import os
import tempfile
import threading
from typing import Any

from dst_t5x.runtime import quiet_tensorflow  # noqa: F401

# isort: split
from etils import epath
import gin
import seqio
import tensorflow as tf

from dst_t5x.core import object_stores
from dst_t5x.core import values
from dst_t5x.core import whole_files
from dst_t5x.core.errors import UserError, first_line

VOCABULARY_VARIABLE = 'DST_VOCABULARY'
PUBLIC_PATH = 'gs://t5-data/vocabs/cc_all.32000.100extra/sentencepiece.model'
EXTRA_IDS = 100
BYTES = 'bytes'
_SECONDS_TO_LOAD = 90.0


@gin.configurable
def chosen(name: values.Path | None = None) -> seqio.Vocabulary:
  """Returns the vocabulary, which reads its file on first use; see `check`.

  Args:
    name: path of a SentencePiece model, or `bytes`; by default what
      `DST_VOCABULARY` says, else the public path.
  """
  return _make(name or os.environ.get(VOCABULARY_VARIABLE) or PUBLIC_PATH)


@functools.cache
def _make(name: str) -> seqio.Vocabulary:
  if name == BYTES:
    return seqio.ByteVocabulary()
  if object_stores.is_remote(name):
    return _InObjectStore(name, extra_ids=EXTRA_IDS)
  return seqio.SentencePieceVocabulary(name, extra_ids=EXTRA_IDS)


class _InObjectStore(seqio.SentencePieceVocabulary):
  """One whose file seqio would read through TensorFlow, which knows no s3://."""

  _model: Any

  def _model_context(self) -> Any:
    if not self._model:
      content = object_stores.read_bytes(self.sentencepiece_model_file)
      with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        here = seqio.SentencePieceVocabulary(file.name, extra_ids=EXTRA_IDS)
        self._model = here._model_context()
    return self._model


class TaskVocabulary(seqio.Vocabulary):
  """Whichever vocabulary is chosen by the time it is used.

  A task is registered when its module is imported, and gin reads what is
  chosen only after that.
  """

  @property
  def bos_id(self) -> int | None:
    """Id of the begin of a sequence."""
    return chosen().bos_id

  @property
  def eos_id(self) -> int | None:
    """Id of the end of a sequence."""
    return chosen().eos_id

  @property
  def unk_id(self) -> int | None:
    """Id of whatever the vocabulary does not know."""
    return chosen().unk_id

  @property
  def extra_ids(self) -> int:
    """How many sentinels there are."""
    return chosen().extra_ids

  @property
  def vocab_size(self) -> int:
    """How many ids there are, sentinels included."""
    return chosen().vocab_size

  @property
  def _base_vocab_size(self) -> int:
    return chosen()._base_vocab_size

  def _encode(self, s: str) -> list[int]:
    return chosen().encode(s)

  def _decode(self, ids: list[int]) -> str:
    return chosen().decode(ids)

  def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
    return chosen().encode_tf(s)

  def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
    return chosen().decode_tf(ids)

  def __eq__(self, other: Any) -> bool:
    if isinstance(other, TaskVocabulary):
      return True
    return isinstance(other, seqio.Vocabulary) and chosen() == other


def t5_vocabulary() -> seqio.Vocabulary:
  """Returns what tasks are registered with."""
  return TaskVocabulary()


def output_features() -> dict[str, seqio.Feature]:
  """Returns inputs and targets in the chosen vocabulary, ended by EOS."""
  return {
    'inputs': seqio.Feature(TaskVocabulary(), add_eos=True),
    'targets': seqio.Feature(TaskVocabulary(), add_eos=True),
  }


def check(vocabulary: seqio.Vocabulary) -> None:
  """Loads a vocabulary, so that a missing file is missed before any work.

  Args:
    vocabulary: any seqio vocabulary; only SentencePiece ones read a file.

  Raises:
    UserError: the file is missing, unreachable, or not a SentencePiece model.
  """
  if isinstance(vocabulary, TaskVocabulary):
    vocabulary = chosen()
  if not isinstance(vocabulary, seqio.SentencePieceVocabulary):
    return
  if reason := _failure(vocabulary.load_model):
    raise UserError(
      f'cannot read the vocabulary {vocabulary.sentencepiece_model_file!r}'
      f' ({reason}); set {VOCABULARY_VARIABLE} to a local SentencePiece model,'
      ' or fetch it with `python -m dst_t5x.prepare_data TASK`'
    )


def check_fits(features: Mapping[str, seqio.Feature], vocab_size: int) -> None:
  """Checks that a model has an embedding for every id of a task.

  Args:
    features: of the task; their vocabularies have been checked.
    vocab_size: token ids that have an embedding.

  Raises:
    UserError: the model's vocabulary is too small.
  """
  for name, feature in features.items():
    if feature.vocabulary.vocab_size > vocab_size:
      raise UserError(
        f'the {name} have a vocabulary of {feature.vocabulary.vocab_size} ids,'
        f' but vocab_size of the model is {vocab_size}: choose another model,'
        ' or set VOCABULARY'
      )


def fetch() -> str:
  """Copies the public vocabulary to where `DST_VOCABULARY` says, if it must.

  Returns:
    Where the vocabulary is; the public path if it is to be read there.

  Raises:
    UserError: it cannot be fetched, or the file is no SentencePiece model.
  """
  path = os.environ.get(VOCABULARY_VARIABLE) or PUBLIC_PATH
  if path not in (PUBLIC_PATH, BYTES) and not epath.Path(path).exists():

    def copy() -> None:
      content = epath.Path(PUBLIC_PATH).read_bytes()
      object_stores.make_folder(epath.Path(path).parent)
      whole_files.write_bytes(path, content)

    if reason := _failure(copy):
      raise UserError(
        f'cannot copy the vocabulary {PUBLIC_PATH!r} to {path!r} ({reason})'
      )
  check(_make(path))
  return path


def _failure(attempt: Callable[[], Any]) -> str:
  """Returns why an attempt failed, nothing if it did not."""
  failures: list[BaseException] = []

  def catch() -> None:
    try:
      attempt()
    except Exception as error:  # TensorFlow's, protobuf's or SentencePiece's.
      failures.append(error)

  # Without a network, Google Cloud Storage is retried for many minutes.
  thread = threading.Thread(target=catch, daemon=True)
  thread.start()
  thread.join(_SECONDS_TO_LOAD)
  if thread.is_alive():
    return f'no answer in {_SECONDS_TO_LOAD:.0f} s'
  return first_line(failures[0]) if failures else ''
