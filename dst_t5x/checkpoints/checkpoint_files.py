"""Shared by all checkpoint formats: result, exact types, new folders."""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import dataclasses
import os
from typing import Any

from etils import epath
import ml_dtypes
import numpy as np

from dst_t5x.adapters import api as adapters
from dst_t5x.core import errors
from dst_t5x.core import machine
from dst_t5x.core import object_stores

_EXACT_IN_FLOAT32 = (np.float32, np.float16, ml_dtypes.bfloat16)


@dataclasses.dataclass(frozen=True)
class LoadedCheckpoint:
  """The parameters of a checkpoint.

  Attributes:
    params: unstacked nested dict of float32 NumPy arrays under T5X's names.
    step: the training step; 0 if unknown.
    adapter: the adapter to apply to the network; `params` includes its
      parameters.
    network: that the checkpoint states, an `api.Network` without the adapter;
      None where it states none.
    companions: name -> content of the files that belong beside the model in a
      Hugging Face folder, such as tokenizer.json.
    is_bfloat16: whether all values were stored as bfloat16.
    note: what was done to the values as they were read; empty for nothing.
  """

  params: dict[str, Any]
  step: int
  adapter: adapters.Adapter = adapters.NONE
  network: Any = None
  companions: Callable[[], Mapping[str, bytes]] = dict
  is_bfloat16: bool = False
  note: str = ''


def to_float32(array: np.ndarray, name: str) -> np.ndarray:
  """Returns the array as float32 of the same shape, without rounding.

  Args:
    array: float32, float16 or bfloat16 of any shape.
    name: the tensor's name, for the error.

  Raises:
    UserError: the array has another type.
  """
  if array.dtype.newbyteorder('=') not in _EXACT_IN_FLOAT32:
    raise errors.UserError(
      f'tensor {name} is {array.dtype}, not float32, float16 or bfloat16'
    )
  return np.asarray(array, dtype=np.float32)


def is_bfloat16(array: np.ndarray) -> bool:
  """Returns whether bfloat16 holds all values of a float32 array exactly."""
  bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
  return not (bits & 0xFFFF).any()


def check_fits(num_bytes: int, path: epath.PathLike) -> None:
  """Checks, before a checkpoint is read, that it fits into memory.

  Args:
    num_bytes: the bytes of all parameters in float32.
    path: the checkpoint, for the message.

  Raises:
    UserError: it is larger than the machine's memory.
  """
  memory = machine.host_memory()
  if num_bytes > memory:
    raise errors.UserError(
      f'{path} claims {num_bytes / 2**30:,.1f} GiB of parameters in float32,'
      f' and this machine has {memory / 2**30:,.1f} GiB of memory'
    )


def absolute(path: epath.PathLike) -> epath.Path:
  """Returns the path as an absolute path; one in an object store unchanged."""
  text = os.fspath(path)
  return epath.Path(
    text if object_stores.is_remote(text) else os.path.abspath(text)
  )


@contextlib.contextmanager
def new_folder(
  target: epath.Path, replace: bool = False
) -> Iterator[epath.Path]:
  """Yields a temporary folder that is renamed to `target` on success.

  On failure nothing remains, and `target` never holds half a checkpoint. An
  object store cannot rename, so there the folder is `target` itself. The caller
  must then write the file that marks a whole checkpoint last.

  Args:
    target: the folder to make.
    replace: whether it may replace an existing one.

  Raises:
    UserError: `target` exists and may not be replaced, or cannot be written.
  """
  if target.exists() and not replace:
    raise errors.UserError(
      f'{target} exists already: remove it or name another'
    )
  if object_stores.is_remote(target):
    with _folder_in_store(target):
      yield target
    return
  temporary = target.parent / f'{target.name}.tmp-{os.getpid()}'
  try:
    temporary.mkdir(parents=True)
    yield temporary
    if not target.exists():
      temporary.rename(target)
      return
    # A folder cannot be renamed onto another.
    older = target.parent / f'{target.name}.old-{os.getpid()}'
    target.rename(older)
    temporary.rename(target)
    older.rmtree()
  except OSError as error:
    raise errors.UserError(f'cannot write {target}: {error}') from error
  finally:
    if temporary.exists():
      temporary.rmtree(missing_ok=True)


@contextlib.contextmanager
def _folder_in_store(target: epath.Path) -> Iterator[None]:
  """Empties `target` before the block, and again if the block fails."""
  with object_stores.explained(target, f'cannot write {target}: '):
    try:
      target.rmtree(missing_ok=True)
      yield
    except Exception:
      with contextlib.suppress(Exception):
        target.rmtree(missing_ok=True)
      raise
