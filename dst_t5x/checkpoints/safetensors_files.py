"""Reads safetensors files tensor by tensor, with the `safetensors` library.

A file on this disk is mapped into memory, so only one tensor at a time is in
memory twice. A file in a bucket is copied to this disk first.
"""

from collections.abc import Collection, Iterator
import contextlib
from typing import Any

from etils import epath

# Registers bfloat16 with NumPy, where the library looks it up.
import ml_dtypes  # noqa: F401
import numpy as np
import safetensors

from dst_t5x.core import object_stores
from dst_t5x.core.errors import UserError, first_line

# The types whose values are exact in float32.
_DTYPES = ('F32', 'F16', 'BF16')


class File:
  """An open safetensors file.

  Attributes:
    path: the file's path.
    names: the names of its tensors.
    metadata: the metadata in its header.
  """

  def __init__(self, path: epath.Path, opened: Any) -> None:
    self.path = path
    self._opened = opened
    self.names: frozenset[str] = frozenset(opened.keys())
    self.metadata: dict[str, str] = opened.metadata() or {}

  def shape(self, name: str) -> tuple[int, ...]:
    """Returns a tensor's shape, from the file's header."""
    return tuple(self._opened.get_slice(name).get_shape())

  def is_bfloat16(self, name: str) -> bool:
    """Returns whether a tensor is stored as bfloat16, by the file's header."""
    return self._opened.get_slice(name).get_dtype() == 'BF16'

  def check(
    self,
    name: str,
    shape: tuple[int, ...],
    asks: str,
    dtypes: Collection[str] = _DTYPES,
  ) -> None:
    """Checks a tensor's shape and type in the file's header.

    Args:
      name: the tensor's name.
      shape: the expected shape.
      asks: subject and verb for the message, such as `the config asks`.
      dtypes: the types that it may have, by default float32, float16 and
        bfloat16.

    Raises:
      UserError: it has another shape or type.
    """
    found = self.shape(name)
    if found != shape:
      raise UserError(
        f'{self.path}: tensor {name} is {found}, {asks} for {shape}'
      )
    dtype = self._opened.get_slice(name).get_dtype()
    if dtype not in dtypes:
      raise UserError(
        f'tensor {name} of {self.path} is {dtype}, not {", ".join(dtypes)}'
      )

  def tensor(self, name: str) -> np.ndarray:
    """Returns a copy of a tensor. Call `check` first.

    Raises:
      UserError: it cannot be read.
    """
    with _one_line(self.path):
      return self._opened.get_tensor(name)


@contextlib.contextmanager
def opened(path: epath.Path) -> Iterator[File]:
  """Opens a file on this disk or in a bucket.

  Raises:
    UserError: it is missing, truncated, damaged, or not a safetensors file.
  """
  with contextlib.ExitStack() as stack:
    with _one_line(path):
      if not path.exists():
        raise UserError(f'{path} is missing')
      here = stack.enter_context(object_stores.on_this_disk(path))
      file = stack.enter_context(safetensors.safe_open(here, framework='np'))
    found = File(path, file)
    odd = sorted(name for name in found.names if not name.isprintable())
    if odd:  # Messages quote names, so a name must be printable.
      raise UserError(f'{path} has a tensor with the name {odd[0][:60]!a}')
    yield found


def prefix_hint(found: Collection[str], known: Collection[str]) -> str:
  """Returns advice if all names have the same extra prefix.

  Args:
    found: the names in a file.
    known: the names that the model has.

  Returns:
    Text to append to a message; '' if there is no such prefix.
  """
  for name in found:
    parts = name.split('.')
    for i in range(1, len(parts)):
      prefix = '.'.join(parts[:i]) + '.'
      if name.removeprefix(prefix) in known and all(
        one.startswith(prefix) for one in found
      ):
        return (
          f'; its names begin with {prefix!r}, as of a model inside another:'
          ' save the inner model, or take the prefix away'
        )
  return ''


@contextlib.contextmanager
def _one_line(path: epath.Path) -> Iterator[None]:
  """Turns errors of reading a file into UserErrors of one line."""
  try:
    with object_stores.explained(path, f'cannot read {path}: '):
      yield
  except safetensors.SafetensorError as e:
    raise UserError(
      f'{path} is truncated or damaged, or no safetensors file: {first_line(e)}'
    ) from e
