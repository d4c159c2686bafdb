"""Vocabularies of tasks: checks, and the chosen one as a task has it.

`vocabulary` says which one is chosen.
"""

from collections.abc import Callable, Mapping
import os
import threading
from typing import Any, Literal

from dst_t5x.runtime import quiet_tensorflow  # noqa: F401

# isort: split
from etils import epath
import seqio
import tensorflow as tf

from dst_t5x.core import object_stores
from dst_t5x.core import whole_files
from dst_t5x.core.errors import UserError, first_line
from dst_t5x.data import chat_vocabulary
from dst_t5x.data import conversations
from dst_t5x.data import text_files
from dst_t5x.data import tokenizers_vocabulary
from dst_t5x.data import vocabulary as vocabulary_lib

_SECONDS_TO_LOAD = 90.0


# What a task's text is: a feature with a part in a chat, or a document.
Part = Literal['inputs', 'targets', 'text']


def has_chat() -> bool:
  """Returns whether texts are put into a chat template."""
  return isinstance(vocabulary_lib.chosen(), chat_vocabulary.ChatVocabulary)


def check_messages(asked: str) -> None:
  """Checks that the chosen vocabulary makes a prompt of a conversation.

  Args:
    asked: the conversation, by `conversations.to_text`.

  Raises:
    MalformedRow: the chat template refuses the messages.
    UserError: there is no chat template.
  """
  chat = vocabulary_lib.chosen()
  if not isinstance(chat, chat_vocabulary.ChatVocabulary):
    raise UserError(
      f'rows with {conversations.KEY!r} need a chat template: set CHAT_TEMPLATE'
      ' = True, with a model that has one'
    )
  try:
    chat.check_messages(asked)
  except UserError as error:
    raise text_files.MalformedRow(f'is no chat: {error}') from error


class TaskVocabulary(seqio.Vocabulary):
  """A vocabulary that looks up the chosen one at each use.

  A task is registered when its module is imported, before gin reads which
  vocabulary is chosen.

  Attributes:
    part: what its texts are; a document is put into no chat template.
  """

  def __init__(self, part: Part = 'text') -> None:
    """Takes what the texts are."""
    super().__init__()
    self.part = part

  @property
  def chosen(self) -> seqio.Vocabulary:
    """The chosen vocabulary."""
    found = vocabulary_lib.chosen()
    if not isinstance(found, chat_vocabulary.ChatVocabulary):
      return found
    parts = {'inputs': found, 'targets': found.answers, 'text': found.base}
    return parts[self.part]

  @property
  def bos_id(self) -> int | None:
    """The id of the beginning of a sequence."""
    return self.chosen.bos_id

  @property
  def eos_id(self) -> int | None:
    """The id of the end of a sequence."""
    return self.chosen.eos_id

  @property
  def unk_id(self) -> int | None:
    """The id of unknown pieces."""
    return self.chosen.unk_id

  @property
  def extra_ids(self) -> int:
    """The number of sentinels."""
    return self.chosen.extra_ids

  @property
  def vocab_size(self) -> int:
    """The number of ids, sentinels included."""
    return self.chosen.vocab_size

  @property
  def _base_vocab_size(self) -> int:
    return self.chosen._base_vocab_size

  def _encode(self, s: str) -> list[int]:
    return self.chosen.encode(s)

  def _decode(self, ids: list[int]) -> str:
    return self.chosen.decode(ids)

  def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
    return self.chosen.encode_tf(s)

  def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
    return self.chosen.decode_tf(ids)

  def __eq__(self, other: Any) -> bool:
    if isinstance(other, TaskVocabulary):
      return self.part == other.part
    return isinstance(other, seqio.Vocabulary) and self.chosen == other


def output_features() -> dict[str, seqio.Feature]:
  """Returns the features `inputs` and `targets`, which end with EOS."""
  return {
    'inputs': seqio.Feature(TaskVocabulary('inputs'), add_eos=True),
    'targets': seqio.Feature(TaskVocabulary('targets'), add_eos=True),
  }


def of_feature(feature: seqio.Feature) -> seqio.Vocabulary:
  """Returns the vocabulary that a feature has now."""
  found = feature.vocabulary
  return found.chosen if isinstance(found, TaskVocabulary) else found


def check(vocabulary: seqio.Vocabulary) -> None:
  """Loads a vocabulary, so that a missing file is reported before any work.

  Args:
    vocabulary: any seqio vocabulary; only SentencePiece ones read a file.

  Raises:
    UserError: the file is missing, unreachable, or no SentencePiece model.
  """
  if isinstance(vocabulary, TaskVocabulary):
    vocabulary = vocabulary.chosen
  if isinstance(vocabulary, chat_vocabulary.ChatVocabulary):
    check(vocabulary.base)
    vocabulary.load()
  if isinstance(vocabulary, tokenizers_vocabulary.TokenizersVocabulary):
    vocabulary.load()
  if not isinstance(vocabulary, seqio.SentencePieceVocabulary):
    return
  if reason := _failure(vocabulary.load_model):
    raise UserError(
      f'cannot read the vocabulary {vocabulary.sentencepiece_model_file!r}'
      f' ({reason}); set {vocabulary_lib.VOCABULARY_VARIABLE} to a local'
      ' SentencePiece model, or fetch it with `python -m dst_t5x.prepare_data'
      ' TASK`'
    )


def check_chat(task: str, features: Mapping[str, seqio.Feature]) -> None:
  """Raises UserError if CHAT_TEMPLATE is set and has no effect on a task."""
  own = [
    name
    for name, feature in features.items()
    if not isinstance(feature.vocabulary, TaskVocabulary)
    or feature.vocabulary.part == 'text'
  ]
  if own and has_chat():
    raise UserError(
      f'CHAT_TEMPLATE has no effect on the {" and ".join(own)} of task'
      f' {task!r}, which are no questions and answers in the VOCABULARY: set it'
      ' to False'
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
  vocabulary = of_feature(features['targets'])
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
  public = vocabulary_lib.PUBLIC_PATH
  path = os.environ.get(vocabulary_lib.VOCABULARY_VARIABLE) or public
  is_file = path not in (public, vocabulary_lib.BYTES)
  if is_file and not epath.Path(path).exists():

    def copy() -> None:
      content = epath.Path(public).read_bytes()
      object_stores.make_folder(epath.Path(path).parent)
      whole_files.write_bytes(path, content)

    if reason := _failure(copy):
      raise UserError(
        f'cannot copy the vocabulary {public!r} to {path!r} ({reason})'
      )
  check(vocabulary_lib.chosen(path, False))
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
