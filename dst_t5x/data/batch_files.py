"""Files of stored batches: safetensors shards, and `batches.json` about them.

    DIR/batches.json                      what the batches are; written last
    DIR/training-00000.safetensors        packed rows, [steps, batch, length]
    DIR/evaluation-00000.safetensors      rows of examples, [examples, length]
    DIR/evaluation.jsonl                  their texts, to be written again
    DIR/held_out-00000.safetensors        the same of HELD_OUT_TASK
    DIR/vocabulary.model, .json           what turns ids into texts

`batches.json` is an object with `format`; `configuration`, the SHA-256 of the
next four, which each shard has in its metadata; `settings`, `identity`,
`network` and `rows`, what the batches are of; and for each part its features
and its files with their SHA-256. Integers are stored in the
smallest unsigned type that holds them, and read in the type that they had.
"""

from collections.abc import Iterator, Mapping
import hashlib
import os
from typing import Any

from etils import epath
import numpy as np
import safetensors.numpy

from dst_t5x.core import json_object
from dst_t5x.core import json_text
from dst_t5x.core import object_stores
from dst_t5x.core import whole_files
from dst_t5x.core.errors import UserError, writing

FILE = 'batches.json'
FORMAT = 1
_MOST_BYTES = 2**27  # In memory, of a shard's rows before the last.
_CONFIGURATION = ('settings', 'identity', 'network', 'rows')
_AGAIN = 'prepare the batches again'


def digest(about: Mapping[str, Any]) -> str:
  """Returns the SHA-256 of what batches are of; see `batches.json`."""
  of = {name: about.get(name) for name in _CONFIGURATION}
  text = json_text.dumps(of, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


class Writer:
  """Writes the rows of one part in shards."""

  def __init__(self, folder: epath.Path, part: str, configuration: str) -> None:
    """Begins.

    Args:
      folder: the folder, which exists.
      part: the beginning of the files' names.
      configuration: see `digest`.
    """
    self._folder, self._part = folder, part
    self._metadata = {'configuration': configuration}
    self._rows: list[dict[str, np.ndarray]] = []
    self._bytes = 0
    self._dtypes: dict[str, str] = {}
    self._files: list[dict[str, Any]] = []

  def add(self, rows: Mapping[str, np.ndarray]) -> None:
    """Appends rows, name -> [rows, …]."""
    self._dtypes = {name: str(x.dtype) for name, x in rows.items()}
    self._rows.append(dict(rows))
    self._bytes += sum(x.nbytes for x in rows.values())
    if self._bytes >= _MOST_BYTES:
      self._write()

  def finish(self) -> dict[str, Any]:
    """Writes what is left; returns the part's entry in `batches.json`."""
    if self._rows:
      self._write()
    return {'features': self._dtypes, 'files': self._files}

  def _write(self) -> None:
    tensors = {
      name: _narrow(np.concatenate([rows[name] for rows in self._rows]))
      for name in self._dtypes
    }
    count = len(next(iter(tensors.values())))
    content = safetensors.numpy.save(tensors, self._metadata)
    name = f'{self._part}-{len(self._files):05d}.safetensors'
    self._files.append(write(self._folder, name, content) | {'rows': count})
    self._rows, self._bytes = [], 0


def _narrow(array: np.ndarray) -> np.ndarray:
  if array.dtype.kind not in 'iu' or not array.size or array.min() < 0:
    return np.ascontiguousarray(array)
  return array.astype(np.min_scalar_type(array.max()))


def write(folder: epath.Path, name: str, content: bytes) -> dict[str, Any]:
  """Writes a file; returns its entry: name, bytes and SHA-256.

  Raises:
    UserError: the file cannot be written.
  """
  with writing(f'BATCHES {folder}'):
    whole_files.write_bytes(folder / name, content)
  sha256 = hashlib.sha256(content).hexdigest()
  return {'name': name, 'bytes': len(content), 'sha256': sha256}


def read(folder: epath.Path, entry: Mapping[str, Any]) -> bytes:
  """Returns the content of a file.

  Args:
    folder: the folder.
    entry: what `write` returned.

  Raises:
    UserError: the file is missing or has changed.
  """
  path = folder / entry['name']
  check(folder, entry)
  content = object_stores.read_bytes(path)
  if hashlib.sha256(content).hexdigest() != entry['sha256']:
    raise UserError(f'{path} is damaged: its SHA-256 is another one; {_AGAIN}')
  return content


def check(folder: epath.Path, entry: Mapping[str, Any]) -> None:
  """Raises UserError if a file is missing or has another size."""
  path = folder / entry['name']
  with object_stores.explained(path, 'cannot read BATCHES: '):
    if not path.exists():
      raise UserError(f'{path} is missing; {_AGAIN}')
    size = path.stat().length
  if size != entry['bytes']:
    raise UserError(
      f'{path} is damaged: it has {size} bytes, not {entry["bytes"]}; {_AGAIN}'
    )


class Part:
  """The rows of one part, read a shard at a time."""

  def __init__(self, folder: epath.Path, entry: Mapping[str, Any]) -> None:
    """Takes the part's entry in `batches.json`."""
    self._folder = folder
    self._files = entry['files']
    self._dtypes = entry['features']

  def __len__(self) -> int:
    return sum(file['rows'] for file in self._files)

  def check(self) -> None:
    """Raises UserError if a file is missing or has another size."""
    for file in self._files:
      check(self._folder, file)

  def rows(self, start: int = 0) -> Iterator[dict[str, np.ndarray]]:
    """Yields name -> array for each row from `start` on.

    Raises:
      UserError: a file is missing or damaged.
    """
    for file in self._files:
      count = file['rows']
      if start < count:
        tensors = safetensors.numpy.load(read(self._folder, file))
        for i in range(start, count):
          yield {
            name: tensors[name][i].astype(dtype)
            for name, dtype in self._dtypes.items()
          }
      start = max(0, start - count)


def write_about(folder: epath.Path, about: Mapping[str, Any]) -> None:
  """Writes `batches.json`, which makes the folder whole.

  Raises:
    UserError: the file cannot be written.
  """
  text = json_text.dumps({'format': FORMAT, **about}, indent=2) + '\n'
  write(folder, FILE, text.encode())


def read_about(folder: str | os.PathLike[str]) -> dict[str, Any]:
  """Returns the content of `batches.json`.

  Raises:
    UserError: there is none, or it is damaged or of a newer version.
  """
  path = epath.Path(folder) / FILE
  object_stores.check(folder)
  with object_stores.explained(path, 'cannot read BATCHES: '):
    if not path.exists():
      raise UserError(
        f'BATCHES {folder} has no {FILE}: make it with `python -m'
        ' dst_t5x.prepare_data TASK --batches DIR`, which writes it last'
      )
  about = json_object.read(path)
  found = about.get('format', int)
  if found > FORMAT:
    raise UserError(
      f'{path} has format {found}, and this version of dst_t5x reads'
      f' {FORMAT}: take a newer version'
    )
  if about.content.get('configuration') != digest(about.content):
    raise UserError(f'{path} is damaged: its settings changed; {_AGAIN}')
  return about.content
