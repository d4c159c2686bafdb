"""The vocabulary of all tasks: T5's by default.

T5's vocabulary has 32,000 SentencePiece pieces and 100 sentinels
(`<extra_id_0>` …). The public checkpoints pad it to 32,128 rows. Machines that
cannot read Google Cloud Storage use a local copy of the model file, named by
the environment variable `DST_VOCABULARY` or by gin (`--gin.VOCABULARY=…`). The
name `bytes` stands for the 256 bytes of UTF-8, for small models. A folder with
Hugging Face's `tokenizer.json` and `tokenizer_config.json` is read as well.
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

from dst_t5x.core import hub
from dst_t5x.core import object_stores
from dst_t5x.core import stable_ids
from dst_t5x.core import values
from dst_t5x.core import whole_files
from dst_t5x.core.errors import UserError, first_line
from dst_t5x.data import tokenizers_vocabulary

VOCABULARY_VARIABLE = 'DST_VOCABULARY'
PUBLIC_PATH = 'gs://t5-data/vocabs/cc_all.32000.100extra/sentencepiece.model'
EXTRA_IDS = 100
BYTES = 'bytes'
_SECONDS_TO_LOAD = 90.0


@gin.configurable
@stable_ids.called('vocabulary')
def chosen(name: values.Path | None = None) -> seqio.Vocabulary:
  """Returns the vocabulary, which reads its file on first use; see `check`.

  Args:
    name: path of a SentencePiece model, of a folder with `tokenizer.json` or of
      that file, `hf://organisation/name[@revision]`, or `bytes`; by default the
      value of `DST_VOCABULARY`, or the public path.
  """
  return _make(name or os.environ.get(VOCABULARY_VARIABLE) or PUBLIC_PATH)


@functools.cache
def _make(name: str) -> seqio.Vocabulary:
  if name == BYTES:
    return seqio.ByteVocabulary()
  if hub.is_model(name):
    name = str(hub.snapshot(name)[0])
  is_folder = not object_stores.is_remote(name) and epath.Path(name).is_dir()
  if is_folder or name.endswith('.json'):
    return tokenizers_vocabulary.TokenizersVocabulary(name)
  if name.endswith('.gguf'):
    raise UserError(
      f'{name} cannot be the vocabulary: write its tokenizer.json with `python'
      ' -m dst_t5x.convert FILE.gguf FOLDER --format=hf`, and name that folder'
    )
  if object_stores.is_remote(name):
    return _InObjectStore(name, extra_ids=EXTRA_IDS)
  return seqio.SentencePieceVocabulary(name, extra_ids=EXTRA_IDS)


class _InObjectStore(seqio.SentencePieceVocabulary):
  """A vocabulary in an object store; seqio's TensorFlow cannot read s3://."""

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
  """A vocabulary that looks up the chosen one at each use.

  A task is registered when its module is imported, before gin reads which
  vocabulary is chosen.
  """

  @property
  def bos_id(self) -> int | None:
    """The id of the beginning of a sequence."""
    return chosen().bos_id

  @property
  def eos_id(self) -> int | None:
    """The id of the end of a sequence."""
    return chosen().eos_id

  @property
  def unk_id(self) -> int | None:
    """The id of unknown pieces."""
    return chosen().unk_id

  @property
  def extra_ids(self) -> int:
    """The number of sentinels."""
    return chosen().extra_ids

  @property
  def vocab_size(self) -> int:
    """The number of ids, sentinels included."""
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
  """Returns the vocabulary that tasks are registered with."""
  return TaskVocabulary()


def output_features() -> dict[str, seqio.Feature]:
  """Returns the features `inputs` and `targets`, which end with EOS."""
  return {
    'inputs': seqio.Feature(TaskVocabulary(), add_eos=True),
    'targets': seqio.Feature(TaskVocabulary(), add_eos=True),
  }


def check(vocabulary: seqio.Vocabulary) -> None:
  """Loads a vocabulary, so that a missing file is reported before any work.

  Args:
    vocabulary: any seqio vocabulary; only SentencePiece ones read a file.

  Raises:
    UserError: the file is missing, unreachable, or no SentencePiece model.
  """
  if isinstance(vocabulary, TaskVocabulary):
    vocabulary = chosen()
  if isinstance(vocabulary, tokenizers_vocabulary.TokenizersVocabulary):
    vocabulary.load()
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
    features: the task's features; their vocabularies have been checked.
    vocab_size: number of ids that have an embedding.

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


def check_special(
  features: Mapping[str, seqio.Feature], eos_id: int, begin_id: int | None
) -> None:
  """Checks that a task and a model begin and end texts with the same tokens.

  Args:
    features: of the task; their vocabularies have been checked.
    eos_id: the token that the model ends with.
    begin_id: the token that the model puts before every example; None for none.

  Raises:
    UserError: the vocabulary has others.
  """
  vocabulary = features['targets'].vocabulary
  if isinstance(vocabulary, TaskVocabulary):
    vocabulary = chosen()
  remedy = "or VOCABULARY to the folder of the model's own tokenizer.json"
  if vocabulary.eos_id not in (None, eos_id):
    raise UserError(
      f'texts of the vocabulary end with token {vocabulary.eos_id}, those of'
      f' the model with {eos_id}: set EOS_ID = {vocabulary.eos_id}, {remedy}'
    )
  begin = getattr(vocabulary, 'begin_id', None)
  if begin != begin_id:
    raise UserError(
      f'texts of the vocabulary begin with token {begin}, those of the model'
      f' with {begin_id}: set BEGIN_ID = {begin}, {remedy}'
    )


def fetch() -> str:
  """Copies the public vocabulary to the path `DST_VOCABULARY`, if necessary.

  Returns:
    The path of the vocabulary; the public path if the variable is not set.

  Raises:
    UserError: the file cannot be copied, or is no SentencePiece model.
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
  """Returns why an attempt failed; '' if it did not."""
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
