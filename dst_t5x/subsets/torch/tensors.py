"""The tensors of a model in PyTorch, under the seed's paths.

A model is a module or a folder of Hugging Face's. Either way its tensors are
read block by block, so that a large one is never in memory twice.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping
import dataclasses
import math

import numpy as np
import torch

from dst_t5x.core.errors import UserError
from dst_t5x.models import hf_places
from dst_t5x.subsets import definition
from dst_t5x.subsets import dtypes

# Name in subset files -> PyTorch's dtype.
DTYPES = {name: getattr(torch, name) for name in dtypes.DTYPES}
_BLOCK_BYTES = 2**24


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A tensor of a model.

  Attributes:
    name: Hugging Face's.
    shape: as Hugging Face has it.
    transposed: whether the seed's has the axes the other way round.
    read: returns the tensor as Hugging Face has it, wherever it is.
    memory: equal where two tensors are one.
  """

  name: str
  shape: tuple[int, ...]
  transposed: bool
  read: Callable[[], torch.Tensor]
  memory: Hashable

  @property
  def our_shape(self) -> tuple[int, ...]:
    """Its shape in the seed."""
    return self.shape[::-1] if self.transposed else self.shape


Tensors = Mapping[str, Tensor]


def check(found: Tensors, wanted: definition.Tensors, what: str) -> None:
  """Raises UserError unless a model has the tensors of a subset.

  Args:
    found: of the model.
    wanted: of the subset, whose dtypes the model need not have.
    what: the model, for messages.
  """
  for path, kind in wanted.items():
    if (name := dtypes.name(kind.dtype)) not in DTYPES:
      raise UserError(
        f'subset: {path} is {name}; PyTorch needs {", ".join(DTYPES)}'
      )
  default = np.dtype(np.float32)
  types = {
    path: definition.TensorType(
      tensor.our_shape, wanted[path].dtype if path in wanted else default
    )
    for path, tensor in found.items()
  }
  definition.check_tensors(types, wanted, what, 'the subset')


def check_shared(found: Tensors, subset: definition.Subset) -> None:
  """Refuses to change what is one tensor in a model and two in the seed."""
  seen: dict[Hashable, str] = {}
  for path, tensor in found.items():
    other = seen.setdefault(tensor.memory, path)
    for changed in {path, other} & subset.positions.keys():
      if other != path:
        raise UserError(
          f'the model has one tensor for {other} and {path}, and the subset '
          f'changes {changed}: load it with tie_word_embeddings=False'
        )


def blocks(tensor: Tensor, dtype: torch.dtype) -> Iterator[torch.Tensor]:
  """Yields the components in the seed's order, on the CPU.

  Args:
    tensor: any.
    dtype: of the blocks.

  Yields:
    Contiguous vectors.

  Raises:
    UserError: the dtype does not hold the tensor's values.
  """
  whole = tensor.read().detach()
  whole = reversed_axes(whole) if tensor.transposed else whole
  rows = whole.reshape(1) if not whole.ndim else whole
  row_bytes = dtype.itemsize * math.prod(rows.shape[1:])
  for part in rows.split(max(1, _BLOCK_BYTES // max(row_bytes, 1))):
    block = part.to(dtype)
    is_exact = torch.promote_types(part.dtype, dtype) == dtype
    if not is_exact and not torch.equal(block.to(part.dtype), part):
      raise UserError(
        f'{tensor.name} is {part.dtype}, the seed is {dtype}, which does not '
        'hold its values: this model is not the seed'
      )
    yield block.contiguous().cpu().reshape(-1)


def reversed_axes(tensor: torch.Tensor) -> torch.Tensor:
  """Returns a view of the tensor with its axes the other way round."""
  return tensor.permute(*reversed(range(tensor.ndim)))


def bits(tensor: torch.Tensor) -> torch.Tensor:
  """Returns the tensor's bits as integers of the same width."""
  return tensor.view(getattr(torch, f'int{8 * tensor.dtype.itemsize}'))


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
  """Returns a module, or the one in what `torch.compile` made of it."""
  return getattr(model, '_orig_mod', model)


def in_module(model: torch.nn.Module) -> dict[str, torch.Tensor]:
  """Returns name -> tensor, the very ones that a module has now."""
  return {
    name: tensor
    for name, tensor in model.state_dict(keep_vars=True).items()
    if isinstance(tensor, torch.Tensor)  # Modules may add state of any kind.
  }


def of_module(model: torch.nn.Module) -> dict[str, Tensor]:
  """Returns the tensors of a Hugging Face module.

  Raises:
    UserError: a tensor is not in memory, is quantised, or is two tensors where
      the seed has one.
  """
  held = {
    name: tensor
    for name, tensor in in_module(model).items()
    if tensor.is_floating_point() or isinstance(tensor, torch.nn.Parameter)
  }
  for name, tensor in held.items():
    _check_held(name, tensor)
  firsts: dict[Hashable, str] = {}
  tied = {}
  for name, tensor in held.items():
    first = firsts.setdefault(_memory(tensor), name)
    if first != name:
      tied[name] = first
  places = hf_places.places(held.keys(), tied)
  for copy, name in places.copies.items():
    if _memory(held[copy]) != _memory(held[name]):
      raise UserError(
        f'{copy} and {name} are two tensors in this model and one in the seed: '
        'call model.tie_weights()'
      )
  return {
    path: _held(name, held[name], transposed)
    for path, (name, transposed) in places.tensors.items()
  }


def _held(name: str, tensor: torch.Tensor, transposed: bool) -> Tensor:
  shape = tuple(tensor.shape)
  return Tensor(name, shape, transposed, lambda: tensor, _memory(tensor))


def _memory(tensor: torch.Tensor) -> Hashable:
  # Empty tensors have none, and are told apart otherwise.
  return (tensor.device, tensor.data_ptr()) if tensor.numel() else id(tensor)


def _check_held(name: str, tensor: torch.Tensor) -> None:
  """Raises UserError unless a tensor's components can be reached."""
  if tensor.device.type == 'meta':
    raise UserError(
      f'{name} is not in memory, but offloaded: load the model with a '
      'device_map without "cpu" offload or "disk"'
    )
  if hasattr(tensor, 'to_local'):
    raise UserError(
      f'{name} is sharded between processes: apply the subset before that'
    )
  # Classes of quantised tensors claim the dtype that they stand for.
  is_plain = type(tensor) in (torch.Tensor, torch.nn.Parameter)
  if tensor.dtype not in DTYPES.values() or not is_plain:
    kind = tensor.dtype if is_plain else f'a {type(tensor).__name__}'
    raise UserError(
      f'{name} is {kind}, perhaps quantised; a subset needs {", ".join(DTYPES)}'
    )
  if tensor.is_inference() and not torch.is_inference_mode_enabled():
    raise UserError(
      f'{name} was made in inference mode and changes in it only: call this '
      'inside of `with torch.inference_mode():`'
    )


def entries(
  subset: definition.Subset, path: str, tensor: Tensor
) -> tuple[np.ndarray, torch.Tensor]:
  """Returns a subset's entries of a tensor, as Hugging Face has it.

  Args:
    subset: with entries of the path.
    path: of the tensor.
    tensor: of the model.

  Returns:
    int64 [k], ascending, into the flattened tensor; and the values [k], in the
    seed's dtype.
  """
  positions, values = subset.positions[path], subset.values[path]
  if tensor.transposed:
    index = np.unravel_index(positions, tensor.our_shape)
    positions = np.ravel_multi_index(index[::-1], tensor.shape)
  order = np.argsort(positions)
  return positions[order], of_values(values[order])


def of_values(values: np.ndarray) -> torch.Tensor:
  """Returns a copy of a subset's values [k] as PyTorch has them."""
  integers = dtypes.bits(values).view(f'int{8 * values.dtype.itemsize}').copy()
  dtype = DTYPES[dtypes.name(values.dtype)]
  return torch.from_numpy(integers).view(dtype)
