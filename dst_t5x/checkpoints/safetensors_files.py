"""Reads safetensors files tensor by tensor, through the library's own reader.

A file on this disk is mapped into memory, so that no more than the tensor at
hand is in memory twice. One in a bucket is copied to this disk first.
"""

from collections.abc import Collection, Iterator
import contextlib
from typing import Any

from etils import epath

# Else the library, which asks NumPy for the type, would not find bfloat16.
import ml_dtypes  # noqa: F401
import numpy as np
import safetensors

from dst_t5x.core import object_stores
from dst_t5x.core.errors import UserError, first_line

# What float32 holds exactly.
_DTYPES = ('F32', 'F16', 'BF16')


class File:
  """An open file.

  Attributes:
    path: where it came from.
    names: of its tensors.
    metadata: what its writer said besides.
  """

  def __init__(self, path: epath.Path, opened: Any) -> None:
    self.path = path
    self._opened = opened
    self.names: frozenset[str] = frozenset(opened.keys())
    self.metadata: dict[str, str] = opened.metadata() or {}

  def shape(self, name: str) -> tuple[int, ...]:
    """Returns a tensor's shape, by the file's header."""
    return tuple(self._opened.get_slice(name).get_shape())

  def is_bfloat16(self, name: str) -> bool:
    """Returns whether a tensor is stored as bfloat16, by the file's header."""
    return self._opened.get_slice(name).get_dtype() == 'BF16'

  def check(self, name: str, shape: tuple[int, ...], asks: str) -> None:
    """Checks a tensor by the file's header, before it is read.

    Args:
      name: of the tensor.
      shape: that it must have.
      asks: who wants that shape, and a verb.

    Raises:
      UserError: it has another shape, or is not float32, float16 or bfloat16.
    """
    found = self.shape(name)
    if found != shape:
      raise UserError(
        f'{self.path}: tensor {name} is {found}, {asks} for {shape}'
      )
    dtype = self._opened.get_slice(name).get_dtype()
    if dtype not in _DTYPES:
      raise UserError(
        f'tensor {name} of {self.path} is {dtype}, not {", ".join(_DTYPES)}'
      )

  def tensor(self, name: str) -> np.ndarray:
    """Returns a tensor that was checked, a copy of its own.

    Raises:
      UserError: it cannot be read.
    """
    with _one_line(self.path):
      return self._opened.get_tensor(name)


@contextlib.contextmanager
def opened(path: epath.Path) -> Iterator[File]:
  """Opens a file, on this disk or in a bucket.

  Raises:
    UserError: it is missing, truncated, damaged or no safetensors file.
  """
  with contextlib.ExitStack() as stack:
    with _one_line(path):
      if not path.exists():
        raise UserError(f'{path} is missing')
      here = stack.enter_context(object_stores.on_this_disk(path))
      file = stack.enter_context(safetensors.safe_open(here, framework='np'))
    found = File(path, file)
    odd = sorted(name for name in found.names if not name.isprintable())
    if odd:  # It would be part of messages.
      raise UserError(f'{path} has a tensor with the name {odd[0][:60]!a}')
    yield found


def prefix_hint(found: Collection[str], known: Collection[str]) -> str:
  """Returns what to do where all names differ from the known by a prefix.

  Args:
    found: names in a file.
    known: names that it might have.

  Returns:
    Something to add to a message, or nothing.
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
  """Raises UserError where a file cannot be read, or is none."""
  try:
    with object_stores.explained(path, f'cannot read {path}: '):
      yield
  except safetensors.SafetensorError as e:
    raise UserError(
      f'{path} is truncated or damaged, or no safetensors file: {first_line(e)}'
    ) from e
