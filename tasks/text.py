"""A language-modelling task: files of documents, without any code.

TRAIN_FILE and EVAL_FILE name a file, or several by a pattern (`books/*.txt`):

    .txt     the whole file is one document
    .jsonl   one document a line, `{"text": "…"}`; other keys are ignored

A document ends with the end token and is cut into rows of the targets' length.
No token is lost: a row that continues a document has the token before it as its
inputs, so that the loss of each token counts once. Short documents share a row
if rows are packed, without seeing each other. A tokenizer without a token that
begins texts leaves nothing to predict the first token of a document from, which
has no loss.

The task `held_out_text` is the same of other files, HELD_OUT_FILE, so that a
run can be evaluated on text that is not of its task; see `engine.held_out`.
"""

from collections.abc import Iterator, Mapping, Sequence
import functools
import glob
import os
from typing import Any, NamedTuple

from etils import epath
import gin
import seqio
import tensorflow as tf

from dst_t5x.core import object_stores
from dst_t5x.core import stable_ids
from dst_t5x.core import values
from dst_t5x.core.errors import UserError
from dst_t5x.data import file_source
from dst_t5x.data import row_files
from dst_t5x.data import task_vocabulary
from dst_t5x.data import text_files

NAME = 'text'
HELD_OUT = 'held_out_text'
_TXT, _JSONL = '.txt', '.jsonl'


def parse_document(line: str) -> str | None:
  """Returns the document of a line of a `.jsonl` file.

  Raises:
    MalformedRow: the line is no object with a text.
  """
  row = text_files.parse_object(line)
  return None if row is None else text_files.text_of(row, 'text')


def _read_document(macro: str, path: str) -> str:
  """Returns a `.txt` file's text, line ends as they are.

  Raises:
    UserError: the file cannot be read, is empty, or is not UTF-8.
  """
  what = f'{macro} {path!r}'
  object_stores.check(path)
  with object_stores.explained(path, f'cannot read {what}: '):
    content = epath.Path(path).read_bytes()
  try:
    text = content.decode('utf-8-sig')
  except UnicodeDecodeError as error:
    line = content.count(b'\n', 0, error.start) + 1
    raise UserError(f'{what} is not UTF-8 in line {line}') from error
  if not text:
    raise UserError(f'{what} is empty')
  return text


class Settings(NamedTuple):
  """The settings of the task.

  Attributes:
    train_file: a path, or a pattern of paths, of the split `train`.
    eval_file: the same, of the splits `validation` and `test`.
  """

  train_file: str | None
  eval_file: str | None


@gin.configurable
@stable_ids.called('text')
def settings(
  train_file: values.Path | None = None, eval_file: values.Path | None = None
) -> Settings:
  """Returns the settings that gin binds; see `Settings`."""
  return Settings(train_file, eval_file)


@gin.configurable
@stable_ids.called(HELD_OUT)
def held_out(file: values.Path | None = None) -> str | None:
  """Returns HELD_OUT_FILE, a path or a pattern of paths, that gin binds."""
  return file


def _named(split: str) -> tuple[str, str | None]:
  """Returns the macro of a split's files, and its value."""
  if split == 'train':
    return 'TRAIN_FILE', settings().train_file
  return 'EVAL_FILE', settings().eval_file


def _named_held_out(split: str) -> tuple[str, str | None]:
  """Returns the same for `held_out_text`, whose splits are all alike."""
  del split
  return 'HELD_OUT_FILE', held_out()


def _files(task: str, split: str) -> dict[str, str]:
  """Returns path -> macro of a split's files, in the order of their names.

  Raises:
    UserError: no file is named or found, or a name has another suffix.
  """
  macro, pattern = (_named if task == NAME else _named_held_out)(split)
  if not pattern:
    raise UserError(
      f'the {split} split of task {task!r} needs files: set --gin.{macro}=…'
    )
  if not glob.has_magic(pattern):
    paths = [pattern]
  elif object_stores.is_remote(pattern):
    paths = [os.fspath(p) for p in _glob_remote(macro, pattern)]
  else:
    paths = glob.glob(pattern, recursive=True)
  if not paths:
    raise UserError(f'{macro}: there is no file {pattern!r}')
  for path in paths:
    if epath.Path(path).suffix not in (_TXT, _JSONL):
      raise UserError(f'{macro} {path!r} must end in {_TXT} or {_JSONL}')
  return dict.fromkeys(sorted(paths), macro)


def _glob_remote(macro: str, pattern: str) -> Iterator[epath.Path]:
  folder, _, name = pattern.rpartition('/')
  if glob.has_magic(folder):
    raise UserError(f'{macro} {pattern!r}: only the name may be a pattern')
  object_stores.check(folder)
  with object_stores.explained(folder, f'cannot read {macro}: '):
    yield from epath.Path(folder).glob(name)


def _rows(macro: str, path: str) -> row_files.File:
  return row_files.File(macro, path, parse_document)


def _documents(task: str, split: str) -> Iterator[bytes]:
  """Yields the documents of a split; raises as `_files`."""
  for path, macro in _files(task, split).items():
    if path.endswith(_TXT):
      yield _read_document(macro, path).encode()
    else:
      yield from (text.encode() for text in _rows(macro, path).rows())


class DocumentSource(file_source.FileSource):
  """The documents of the files that gin names."""

  def __init__(self, task: str) -> None:
    """Takes the task's name, `text` or `held_out_text`."""
    super().__init__()
    self._task = task

  def check(self, split: str) -> None:
    """Raises UserError if a document of a split cannot be read."""
    self.num_input_examples(split)

  def num_input_examples(self, split: str) -> int:
    """Returns the number of documents; raises as `check`."""
    count = 0
    for path, macro in _files(self._task, split).items():
      if path.endswith(_TXT):
        count += bool(_read_document(macro, path))
      else:
        count += _rows(macro, path).check()
    return count

  def rows_of(self, split: str) -> dict[str, Any]:
    """Returns the identity of a split's documents; raises as `check`."""
    return {
      'documents': self.num_input_examples(split),
      **{
        os.path.basename(path): _rows(macro, path).digest()
        for path, macro in _files(self._task, split).items()
      },
    }

  def bytes_of(self, split: str) -> int:
    """Returns the bytes of a split's documents in UTF-8; raises as `check`."""
    return sum(map(len, _documents(self._task, split)))

  def list_shards(self, split: str) -> Sequence[str]:
    """Returns the files of a split."""
    return list(_files(self._task, split))

  def dataset(self, split: str) -> tf.data.Dataset:
    """Returns the documents of a split; see `file_source.FileSource`."""
    _files(
      self._task, split
    )  # What is missing is told before anything is read.
    return tf.data.Dataset.from_generator(
      functools.partial(_documents, self._task, split),
      output_signature=tf.TensorSpec([], tf.string),
    ).map(lambda text: {'targets': text})


def to_rows(
  dataset: tf.data.Dataset, sequence_length: Mapping[str, int] | None
) -> tf.data.Dataset:
  """Cuts documents, tokens with an end token, into rows.

  Args:
    dataset: of `targets`, int32 [length].
    sequence_length: the targets' length; None for a row a document.
  """
  length = (sequence_length or {}).get('targets')

  def cut(document: Mapping[str, tf.Tensor]) -> tf.data.Dataset:
    tokens = document['targets']
    step = tf.cast(length or tf.size(tokens), tf.int64)
    starts = tf.range(0, tf.size(tokens, tf.int64), step)
    return tf.data.Dataset.from_tensor_slices(starts).map(
      lambda start: {
        'inputs': tokens[tf.maximum(start - 1, 0) : start],
        'targets': tokens[start : start + step],
      }
    )

  return dataset.flat_map(cut)


_FEATURE = seqio.Feature(task_vocabulary.TaskVocabulary('text'), add_eos=True)

for _name in (NAME, HELD_OUT):
  seqio.TaskRegistry.add(
    _name,
    source=DocumentSource(_name),
    preprocessors=[
      functools.partial(seqio.preprocessors.tokenize, copy_pretokenized=False),
      seqio.preprocessors.append_eos,
      to_rows,
    ],
    output_features={
      'inputs': seqio.Feature(_FEATURE.vocabulary, add_eos=False),
      'targets': _FEATURE,
    },
    metric_fns=[],
  )
