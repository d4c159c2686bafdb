"""What all checkpoint formats share: the result, exact types, folders."""

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
  """Parameters as a checkpoint holds them.

  Attributes:
    params: unstacked nested dict of float32 NumPy arrays under T5X's names.
    step: the training step; 0 where the format knows none.
    adapter: what the network needs besides, whose parameters are among these.
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
  """Returns the array as float32 of the same shape, without any rounding.

  Args:
    array: float32, float16 or bfloat16 of any shape.
    name: of the tensor, for the error.

  Raises:
    UserError: the array has a type that float32 does not hold exactly.
  """
  if array.dtype.newbyteorder('=') not in _EXACT_IN_FLOAT32:
    raise errors.UserError(
      f'tensor {name} is {array.dtype}, not float32, float16 or bfloat16'
    )
  return np.asarray(array, dtype=np.float32)


def check_fits(num_bytes: int, path: epath.PathLike) -> None:
  """Refuses, before it is read, what this machine cannot hold.

  Args:
    num_bytes: of all parameters in float32.
    path: the checkpoint, for the message.

  Raises:
    UserError: that is more than the machine's memory.
  """
  memory = machine.host_memory()
  if num_bytes > memory:
    raise errors.UserError(
      f'{path} claims {num_bytes / 2**30:,.1f} GiB of parameters in float32,'
      f' and this machine has {memory / 2**30:,.1f} GiB of memory'
    )


def absolute(path: epath.PathLike) -> epath.Path:
  """Returns a path that means the same from any working directory."""
  text = os.fspath(path)
  return epath.Path(
    text if object_stores.is_remote(text) else os.path.abspath(text)
  )


@contextlib.contextmanager
def new_folder(
  target: epath.Path, replace: bool = False
) -> Iterator[epath.Path]:
  """Lends a temporary folder that becomes `target` when all went well.

  Nothing is left behind when the writing fails; `target` never holds half a
  checkpoint. In an object store, which cannot rename, it is `target` itself:
  who writes there writes last what makes it a checkpoint.

  Args:
    target: the folder.
    replace: whether it takes the place of one that is there.

  Raises:
    UserError: `target` exists and must not, or the files cannot be written.
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
  """Removes what is there before the writing, and what is left if it fails."""
  with object_stores.explained(target, f'cannot write {target}: '):
    try:
      target.rmtree(missing_ok=True)
      yield
    except Exception:
      with contextlib.suppress(Exception):
        target.rmtree(missing_ok=True)
      raise
