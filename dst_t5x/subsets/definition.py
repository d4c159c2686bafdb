"""What a subset is: positions and values, and the tensors that they are in.

This module and what it imports need NumPy only, so that readers without JAX
check a subset as strictly as we do.
"""

from collections.abc import Mapping
import dataclasses
import math

import numpy as np

from dst_t5x.core.errors import UserError, nearest
from dst_t5x.subsets import dtypes


@dataclasses.dataclass(frozen=True)
class TensorType:
  """The shape and the dtype of a tensor."""

  shape: tuple[int, ...]
  dtype: np.dtype

  def __post_init__(self) -> None:
    # Equal types are equal, whatever they were made of.
    object.__setattr__(self, 'shape', tuple(self.shape))
    object.__setattr__(self, 'dtype', np.dtype(self.dtype))

  @property
  def size(self) -> int:
    """The number of components."""
    return math.prod(self.shape)


Tensors = Mapping[str, TensorType]


@dataclasses.dataclass(frozen=True)
class Subset:
  """Positions and values of the components that differ from a seed.

  Attributes:
    tensors: path -> shape and dtype, of all tensors of the seed.
    positions: path -> int64 [k], ascending, into the flattened tensor; only
      for tensors with a difference.
    values: path -> [k], the tuned values in the tensor's dtype.
    fingerprint: the seed's fingerprint; None if unknown.
  """

  tensors: Tensors
  positions: Mapping[str, np.ndarray]
  values: Mapping[str, np.ndarray]
  fingerprint: str | None = None

  @property
  def size(self) -> int:
    """The number of free components."""
    return sum(len(p) for p in self.positions.values())


def check_tensors(
  found: Tensors, wanted: Tensors, what: str, whose: str
) -> None:
  """Raises UserError unless both have the same tensors; names the first one."""
  if found == wanted:
    return
  if lacking := sorted(wanted.keys() - found.keys()):
    raise UserError(
      f'subset: {whose} has a tensor {lacking[0]}, {what} has none'
      f'{nearest(lacking[0], found)}'
    )
  if extra := sorted(found.keys() - wanted.keys()):
    raise UserError(
      f'subset: {what} has a tensor {extra[0]}, {whose} has none'
      f'{nearest(extra[0], wanted)}'
    )
  path = min(path for path in wanted if found[path] != wanted[path])
  raise UserError(
    f'subset: {path} is {_text(found[path])} in {what}, {_text(wanted[path])} '
    f'in {whose}'
  )


def _text(tensor: TensorType) -> str:
  return f'{dtypes.name(tensor.dtype)}{[*tensor.shape]}'


def check_fingerprint(subset: Subset, fingerprint: str) -> None:
  """Raises UserError if a subset is known to belong to another seed."""
  if subset.fingerprint not in (None, fingerprint):
    raise UserError(
      'subset: it belongs to the seed with fingerprint '
      f'{str(subset.fingerprint)[:12]}…; this one has {fingerprint[:12]}…'
    )


def check_entries(subset: Subset) -> None:
  """Raises UserError unless positions and values fit their tensors."""
  for path, positions in subset.positions.items():
    values, tensor = subset.values.get(path), subset.tensors.get(path)
    if positions.dtype != np.int64 or positions.ndim != 1:
      raise UserError(f'subset: the positions of {path} are not int64 [k]')
    if tensor is None:
      raise UserError(f'subset: it has no tensor {path}')
    if values is None or values.shape != positions.shape:
      raise UserError(f'subset: {path} has not one value for each position')
    if values.dtype != tensor.dtype:
      raise UserError(
        f'subset: the values of {path} are {dtypes.name(values.dtype)}, the '
        f'tensor is {dtypes.name(tensor.dtype)}'
      )
  paths = [path for path, found in subset.positions.items() if len(found)]
  if not paths:
    return
  # Checks all tensors at once, because there are hundreds.
  ends = np.cumsum([len(subset.positions[path]) for path in paths])
  everywhere = np.concatenate([subset.positions[path] for path in paths])
  first, last = everywhere[[0, *ends[:-1]]], everywhere[ends - 1]
  sizes = [subset.tensors[path].size for path in paths]
  for i in np.flatnonzero((first < 0) | (last >= sizes)):
    raise UserError(
      f'subset: a position of {paths[i]} is outside of the tensor, which has '
      f'{sizes[i]} components'
    )
  falls = np.flatnonzero(everywhere[1:] <= everywhere[:-1])
  for fall in np.setdiff1d(falls, ends[:-1] - 1, assume_unique=True):
    path = paths[np.searchsorted(ends, fall, side='right')]
    raise UserError(f'subset: the positions of {path} are not ascending')


def check_finite(values: Mapping[str, np.ndarray]) -> None:
  """Raises UserError if a value of a subset is not finite.

  Args:
    values: path -> [k], the values of a tensor.
  """
  # Checks all tensors of a dtype at once, because there are hundreds.
  for dtype in {of_tensor.dtype for of_tensor in values.values()}:
    of_dtype = [v for v in values.values() if v.dtype == dtype]
    if not dtypes.is_finite(np.concatenate(of_dtype)).all():
      path = next(p for p, v in values.items() if not dtypes.is_finite(v).all())
      raise UserError(f'subset: a value of {path} is not finite')
