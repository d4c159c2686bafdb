"""Subsets in a module of Hugging Face's: applied in place, and reverted.

The components that change are kept, as the module held them. So the base comes
back bit for bit, in any dtype and on any device. One call at a time changes
modules; a module that changes cannot be run by another thread meanwhile.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import threading
from typing import ParamSpec, TypeVar
import weakref

import torch

from dst_t5x.core.errors import UserError
from dst_t5x.subsets import definition
from dst_t5x.subsets.torch import base_check
from dst_t5x.subsets.torch import folders
from dst_t5x.subsets.torch import tensors as tensors_lib

Module = torch.nn.Module
_P = ParamSpec('_P')
_T = TypeVar('_T')
# Two threads that see no subset in a module would both write theirs.
_lock = threading.RLock()


def _alone(function: Callable[_P, _T]) -> Callable[_P, _T]:
  """Makes a function run in one thread at a time, without gradients."""

  @functools.wraps(function)
  def run(*args: _P.args, **kwargs: _P.kwargs) -> _T:
    with _lock, torch.no_grad():
      return function(*args, **kwargs)

  return run


@dataclasses.dataclass(eq=False)
class _Entries:
  """The entries of one tensor.

  Attributes:
    name: Hugging Face's.
    tensor: the module's.
    index: int64 [k], into the flattened tensor, ascending.
    tuned: [k], the subset's values in the tensor's dtype.
    base: [k], what the tensor held.
  """

  name: str
  tensor: torch.Tensor
  index: torch.Tensor
  tuned: torch.Tensor
  base: torch.Tensor

  def write(self, values: torch.Tensor) -> None:
    view, where = _view(self.tensor, self.index)
    view.index_put_(where, values.to(view.device))

  def check(
    self, held: Mapping[str, torch.Tensor], values: torch.Tensor
  ) -> None:
    """Raises UserError unless a module's tensor has these values, bit for bit.

    Args:
      held: name -> tensor, of the module now.
      values: [k].
    """
    if held.get(self.name) is not self.tensor:
      raise UserError(
        f'{self.name} has been replaced since the subset was placed or applied:'
        ' load the model again'
      )
    view, where = _view(self.tensor, self.index)
    found = view[where].to(values.device)
    if found.dtype == values.dtype and torch.equal(
      tensors_lib.bits(found), tensors_lib.bits(values)
    ):
      return
    raise UserError(
      f'{self.name} has been changed since the subset was placed or applied: '
      'load the model again'
    )


@dataclasses.dataclass(eq=False)
class Placed:
  """A subset beside a module: what to write where, on the module's devices.

  As a context it takes the subset out of the module at the end.

  Attributes:
    size: the number of values.
    rounded: how many of them the module's dtypes do not hold exactly.
  """

  size: int
  rounded: int
  _model: 'weakref.ref[Module]'
  _entries: list[_Entries]
  _tensors: list[torch.Tensor]
  # The seed's fingerprint, and the module's state with the subset in it.
  _after: base_check.Verified | None = None

  @property
  def nbytes(self) -> int:
    """Bytes on the module's devices, besides the module's own."""
    return sum(
      vector.nbytes
      for entries in self._entries
      for vector in (entries.index, entries.tuned, entries.base)
    )

  def _write(self, *, tuned: bool) -> None:
    """Writes all values, or none: an interrupted write is taken back."""
    try:
      for entries in self._entries:
        entries.write(entries.tuned if tuned else entries.base)
    except BaseException:
      for entries in self._entries:
        entries.write(entries.base if tuned else entries.tuned)
      raise

  def __enter__(self) -> 'Placed':
    return self

  def __exit__(self, *error: object) -> None:
    model = self._model()
    if model is not None and _applied.get(model) is self:
      revert(model)


# Module -> what is in it.
_applied: weakref.WeakKeyDictionary[Module, Placed] = (
  weakref.WeakKeyDictionary()
)


@_alone
def place(
  model: Module,
  subset: definition.Subset,
  base: folders.Folder | None = None,
) -> Placed:
  """Returns a subset ready to be applied, again and again; changes nothing.

  Args:
    model: a Hugging Face module that holds the seed, on any devices.
    subset: of the same seed.
    base: the folder that the model was loaded from. It is needed where loading
      has rounded the seed: the folder then has the seed's fingerprint, which is
      cached, and the model has to be the folder, rounded.

  Raises:
    UserError: the model is not the subset's seed, a subset is applied, or the
      model cannot hold the subset.
  """
  model = tensors_lib.unwrapped(model)
  _check_free(model)
  definition.check_entries(subset)
  definition.check_finite(subset.values)
  tensors = tensors_lib.of_module(model)
  tensors_lib.check(tensors, subset.tensors, 'the model')
  tensors_lib.check_shared(tensors, subset)
  base_check.check_seed(model, tensors, subset, base)
  entries, rounded = [], 0
  for path in subset.positions:
    index, values = tensors_lib.entries(subset, path, tensors[path])
    found = _entries_of(tensors[path], torch.from_numpy(index), values)
    rounded += int((found.tuned.cpu().to(values.dtype) != values).sum())
    entries.append(found)
  held = [tensor.read() for tensor in tensors.values()]
  return Placed(subset.size, rounded, weakref.ref(model), entries, held)


@_alone
def apply(
  model: Module,
  subset: definition.Subset | Placed,
  base: folders.Folder | None = None,
) -> Placed:
  """Writes a subset's values into a module, in place.

      with apply(model, subset):
        model.generate(...)

  Args:
    model: see `place`.
    subset: of the model's seed; or what `place` returned for the model, which
      takes a fraction of the time.
    base: see `place`.

  Returns:
    What was written; it takes the subset out at the end of a `with`.

  Raises:
    UserError: see `place`. The model is then as it was.
  """
  model = tensors_lib.unwrapped(model)
  if isinstance(subset, Placed):
    placed = subset
    _check_free(model)
    if placed._model() is not model:
      raise UserError('this subset was placed for another model')
    held = tensors_lib.in_module(model)
    for entries in placed._entries:
      entries.check(held, entries.base)
  else:
    placed = place(model, subset, base)
  known = base_check.forget(model, placed._tensors)
  placed._write(tuned=True)
  placed._after = base_check.state(placed._tensors, known)
  _applied[model] = placed
  return placed


@_alone
def revert(model: Module) -> None:
  """Takes a subset out of a module, which then has the base's bits again.

  Raises:
    UserError: none is applied, or its values have been changed since.
  """
  model = tensors_lib.unwrapped(model)
  placed = _applied.get(model)
  if placed is None:
    raise UserError('no subset is applied to this model')
  held = tensors_lib.in_module(model)
  for entries in placed._entries:
    entries.check(held, entries.tuned)
  known = base_check.still(placed._tensors, placed._after)
  placed._write(tuned=False)
  del _applied[model]
  base_check.remember(model, placed._tensors, known)


@_alone
def merge(
  model: Module,
  subset: definition.Subset,
  base: folders.Folder | None = None,
) -> Module:
  """Applies a subset for good: the model is a new one, to be saved or tuned.

  Args:
    model: see `place`.
    subset: see `apply`.
    base: see `place`.

  Returns:
    The model, for `merge(…).save_pretrained(folder)`.

  Raises:
    UserError: see `place`.
  """
  apply(model, subset, base)
  del _applied[tensors_lib.unwrapped(model)]
  return model


def _view(
  tensor: torch.Tensor, index: torch.Tensor
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
  """Returns what to index with what, to reach components in place."""
  tensor, index = tensor.detach(), index.to(tensor.device)
  if tensor.is_contiguous():
    return tensor.view(-1), (index,)
  return tensor, torch.unravel_index(index, tensor.shape)


def _entries_of(
  tensor: tensors_lib.Tensor, index: torch.Tensor, values: torch.Tensor
) -> _Entries:
  """Returns the entries of a tensor on its device, with what it holds."""
  held = tensor.read()
  tuned = values.to(held.dtype)
  if not tuned.isfinite().all():
    raise UserError(
      f'a value of {tensor.name} is too large for {held.dtype}: load the model '
      'in float32 or bfloat16'
    )
  index = index.to(held.device)
  view, where = _view(held, index)
  return _Entries(tensor.name, held, index, tuned.to(held.device), view[where])


def _check_free(model: Module) -> None:
  """Raises UserError if a subset is applied."""
  if model in _applied:
    raise UserError('a subset is applied to this model: call revert(model)')
