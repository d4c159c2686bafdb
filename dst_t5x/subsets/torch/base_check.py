"""Whether a module is a subset's seed; remembered until it is changed.

PyTorch counts the changes of each tensor, so a module need not be hashed again
for every subset. Changes of values through `tensor.data` are not counted.
"""

import dataclasses
import weakref

import torch
from torch.multiprocessing import reductions

from dst_t5x.core.errors import UserError
from dst_t5x.subsets import definition
from dst_t5x.subsets.torch import base_hash
from dst_t5x.subsets.torch import folders
from dst_t5x.subsets.torch import tensors as tensors_lib

Module = torch.nn.Module
# Of each tensor: its memory, where it begins there, its changes, and its dtype.
_State = tuple[tuple[reductions.StorageWeakRef, int, int, torch.dtype], ...]


@dataclasses.dataclass(frozen=True)
class Verified:
  """What is known of a module.

  Attributes:
    state: of its tensors; others mean that they have been changed.
    fingerprint: of the seed that it is, apart from an applied subset.
  """

  state: _State
  fingerprint: str


_verified: weakref.WeakKeyDictionary[Module, Verified] = (
  weakref.WeakKeyDictionary()
)


def check_seed(
  model: Module,
  tensors: tensors_lib.Tensors,
  subset: definition.Subset,
  base: folders.Folder | None,
) -> None:
  """Raises UserError unless the model is the subset's seed, perhaps rounded."""
  if subset.fingerprint is None:
    return
  held = [tensor.read() for tensor in tensors.values()]
  known = still(held, _verified.get(model))
  if known == subset.fingerprint:
    return
  if base is None:
    found = base_hash.of_tensors(tensors, subset.tensors)
    if found != subset.fingerprint and _is_narrower(tensors, subset):
      raise UserError(
        f'the model has the fingerprint {found[:12]}…, not '
        f'{subset.fingerprint[:12]}…. If loading it has rounded the seed, name '
        'the folder that it was loaded from: base=FOLDER'
      )
    definition.check_fingerprint(subset, found)
  else:
    _check_rounded(tensors, folders.check_seed(base, subset))
  remember(model, held, subset.fingerprint)


def remember(
  model: Module, held: list[torch.Tensor], fingerprint: str | None
) -> None:
  """Notes the fingerprint of a module with these tensors, if it is known."""
  _verified.pop(model, None)
  if found := state(held, fingerprint):
    _verified[model] = found


def forget(model: Module, held: list[torch.Tensor]) -> str | None:
  """Returns what was known of a module, which is about to be changed."""
  return still(held, _verified.pop(model, None))


def state(held: list[torch.Tensor], fingerprint: str | None) -> Verified | None:
  """Returns what is known of tensors, if it can be told when they change."""
  found = _state_of(held)
  return Verified(found, fingerprint) if found and fingerprint else None


def still(held: list[torch.Tensor], known: Verified | None) -> str | None:
  """Returns the fingerprint that is known, if nothing has changed since."""
  is_known = known is not None and known.state == _state_of(held)
  return known.fingerprint if known and is_known else None


def _is_narrower(
  tensors: tensors_lib.Tensors, subset: definition.Subset
) -> bool:
  """Returns whether some dtypes of a model do not hold all of the seed's."""
  names = base_hash.names_of(subset.tensors)
  return any(
    tensor.read().dtype.itemsize < tensors_lib.DTYPES[names[path]].itemsize
    for path, tensor in tensors.items()
  )


def _check_rounded(
  tensors: tensors_lib.Tensors, seed: tensors_lib.Tensors
) -> None:
  """Raises UserError unless a model is what loading a folder gives."""
  for path, tensor in tensors.items():
    found = tensor.read()
    wanted = seed[path].read()
    if tensor.transposed != seed[path].transposed:
      wanted = tensors_lib.reversed_axes(wanted)
    wanted = wanted.to(found.dtype)
    if not torch.equal(
      tensors_lib.bits(found.cpu().contiguous()),
      tensors_lib.bits(wanted.contiguous()),
    ):
      raise UserError(
        f"{tensor.name} is not the base folder's in {found.dtype}: load the "
        'model again'
      )


def _state_of(tensors: list[torch.Tensor]) -> _State | None:
  """Returns what differs after tensors have been changed; None if unknown."""
  try:
    return tuple(
      # An address alone may be that of other memory by now: the weights that
      # `half().float()` allocates can be where the first ones were. A weak
      # reference keeps the memory's identity, and not its content.
      (
        reductions.StorageWeakRef(t.untyped_storage()),
        t.data_ptr(),
        t._version,
        t.dtype,
      )
      for t in tensors
    )
  except RuntimeError:  # Tensors made in inference mode do not count changes.
    return None
