"""Subsets in vLLM: patches in the coordinates of the base's checkpoint.

vLLM 0.33 takes such patches in
`vllm.model_executor.model_loader.checkpoint_weight_patch`; its loaders know how
a checkpoint's tensors are packed and sharded. See docs/pytorch.md.
"""

from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

import torch

from dst_t5x.core.errors import UserError
from dst_t5x.subsets import definition
from dst_t5x.subsets import file
from dst_t5x.subsets.torch import folders
from dst_t5x.subsets.torch import tensors as tensors_lib


class Patch(NamedTuple):
  """New values of some components of a checkpoint's tensor.

  It has the attributes of vLLM's `CheckpointWeightPatch`.

  Attributes:
    name: Hugging Face's, of the tensor.
    shape: of the whole tensor, as Hugging Face has it.
    dtype: of the values.
    indices: int64 [k], into the flattened tensor, strictly increasing.
    values: [k], none is NaN, which marks what stays as it is.
  """

  name: str
  shape: tuple[int, ...]
  dtype: torch.dtype
  indices: torch.Tensor
  values: torch.Tensor


def patches(
  subset: definition.Subset, base: folders.Folder, *, reverse: bool = False
) -> Iterator[Patch]:
  """Returns what makes the base the tuned model, tensor by tensor.

  Args:
    subset: of the base.
    base: the base's folder, as Hugging Face has it.
    reverse: whether the patches bring back the base instead. Their dtype is the
      checkpoint's, that of the others the seed's.

  Raises:
    UserError: the folder is not the subset's seed, or a value is not finite.
  """
  definition.check_entries(subset)
  definition.check_finite(subset.values)
  tensors = folders.check_seed(base, subset)
  tensors_lib.check_shared(tensors, subset)
  return (
    _patch(subset, path, tensors[path], reverse)
    for path in sorted(subset.positions)
  )


def _patch(
  subset: definition.Subset,
  path: str,
  tensor: tensors_lib.Tensor,
  reverse: bool,
) -> Patch:
  index, values = tensors_lib.entries(subset, path, tensor)
  indices = torch.from_numpy(index)
  if reverse:
    values = tensor.read().reshape(-1)[indices]
    if values.isnan().any():
      raise UserError(
        f'the base has a NaN in {tensor.name}, which vLLM cannot write'
      )
  return Patch(tensor.name, tensor.shape, values.dtype, indices, values)


class WorkerExtension:
  """Lets a vLLM server change its subset: what `--worker-extension-cls` takes.

  vLLM makes this a base of its worker, which has `get_model`. The methods are
  called by their names through `/collective_rpc`.
  """

  _dst_t5x_reverse: ClassVar[tuple[Patch, ...]] = ()

  def dst_t5x_apply(self: Any, path: str, base: str) -> int:
    """Replaces the subset that is applied, if any; returns the new one's size.

    Args:
      path: the subset file.
      base: the folder of the base that is served.

    Raises:
      UserError: the file is damaged, is not the base's, or has a value that
        the server's dtype has not. The old subset stays.
    """
    subset = file.load(path)[0]
    _check_range(self.get_model(), subset)
    forward = tuple(patches(subset, base))
    back = tuple(patches(subset, base, reverse=True))
    self.dst_t5x_revert()
    # First: what is written in part can be taken back, too.
    self._dst_t5x_reverse = back
    _load(self.get_model(), forward)
    return subset.size

  def dst_t5x_revert(self: Any) -> None:
    """Brings back the base."""
    _load(self.get_model(), self._dst_t5x_reverse)
    self._dst_t5x_reverse = ()


def _check_range(model: torch.nn.Module, subset: definition.Subset) -> None:
  """Raises UserError if a value would be infinite in a model in float16."""
  dtypes = {parameter.dtype for parameter in model.parameters()}
  if torch.float16 not in dtypes:
    return
  for path, values in subset.values.items():
    if not tensors_lib.of_values(values).half().isfinite().all():
      raise UserError(
        f'a value of {path} is too large for float16: serve with '
        '--dtype=bfloat16 or float32'
      )


def _load(model: torch.nn.Module, some: tuple[Patch, ...]) -> None:
  from vllm.model_executor.model_loader import checkpoint_weight_patch as theirs

  theirs.load_checkpoint_weight_patches(
    model, [theirs.CheckpointWeightPatch(**patch._asdict()) for patch in some]
  )
