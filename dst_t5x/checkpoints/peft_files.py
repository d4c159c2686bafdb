"""Adapters in the format of Hugging Face PEFT, read and written without torch.

A folder holds adapter_config.json and adapter_model.safetensors. What differs
from ours: linear maps are [out, in] there and [in, out] here, modules have the
names of the base's family, and what is adapted is a list of modules' names, or
of their ends, where we have a regular expression. An adapter says itself what
PEFT calls it and its tensors, see `adapters.peft`.
"""

from collections.abc import Collection, Mapping
from typing import Any

from etils import epath
import numpy as np

from dst_t5x.adapters import api as adapters
from dst_t5x.adapters import peft
from dst_t5x.checkpoints import checkpoint_files
from dst_t5x.checkpoints import peft_config
from dst_t5x.checkpoints import peft_folder
from dst_t5x.checkpoints import peft_targets
from dst_t5x.checkpoints import safetensors_files
from dst_t5x.core import json_object
from dst_t5x.core import parts
from dst_t5x.core.errors import UserError
from dst_t5x.models import families

PyTree = Any


def is_known(adapter: adapters.Adapter) -> bool:
  """Whether PEFT has this kind of adapter."""
  return bool(adapter.peft_type)


def save(
  path: epath.PathLike,
  adapter: adapters.Adapter,
  added: Mapping[str, np.ndarray],
  base: PyTree,
  seed: Mapping[str, Any],
  step: int,
  replace: bool = False,
) -> None:
  """Writes a folder for `peft.PeftModel.from_pretrained`, float32.

  Args:
    path: the folder.
    adapter: one that PEFT has.
    added: path -> its parameters and fixed tensors, layers one by one.
    base: the parameters of the model that it belongs to, unstacked, or their
      shapes.
    seed: that model as a run refers to it: `path`, `format`, `step` and
      `fingerprint`.
    step: of training.
    replace: whether it takes the place of a folder that is there.

  Raises:
    UserError: the folder exists and must not, or cannot be written.
  """
  of = peft_folder.base_of(base)
  modules = {path.rpartition('/')[0] for path in added} & set(of.names)
  layout, arrays = _layout(adapter, modules, of), adapter.peft_arrays(added)
  tensors = {
    name: tensor.exported(arrays[tensor.path])
    for name, tensor in layout.items()
  }
  stated = peft_config.export(adapter, modules, of)
  peft_folder.write(path, tensors, stated, base, seed, step, replace)


def load(
  path: epath.PathLike, base: PyTree
) -> tuple[adapters.Adapter, dict[str, np.ndarray]]:
  """Reads an adapter, which may be PEFT's own.

  Args:
    path: the folder.
    base: as of `save`.

  Returns:
    The adapter, and path -> its parameters, layers one by one.

  Raises:
    UserError: a file is missing or damaged, the adapter is of a kind or has an
      option that is not known here, or it does not fit the base.
  """
  folder = epath.Path(path)
  stated = json_object.read(folder / peft_folder.CONFIG)
  of, family = peft_folder.base_of(base), families.of(base)
  with safetensors_files.opened(peft_folder.weights(folder)) as file:
    modules = peft_targets.adapted(
      stated, family, of.names, peft_folder.adapted(file.names, of)
    )
    try:
      adapter = peft_config.read(stated, modules, of)
    except UserError as e:
      raise UserError(f'{stated.where}: {e}') from e
    layout = _layout(adapter, modules, of)
    names = file.names - peft_folder.copies(file, parts.flatten(base), of)
    if names - layout.keys():
      names = names - _fixed(file, adapter.peft_fixed(modules, of))
    peft_folder.check_names(folder, layout, names)
    added = {}
    for name, tensor in layout.items():
      rows, *rest = tensor.shape
      is_twice = tensor.may_be_twice and file.shape(name)[:1] == (2 * rows,)
      shape = (2 * rows if is_twice else rows, *rest)
      file.check(name, shape, f'its base and {peft_folder.CONFIG} ask')
      array = checkpoint_files.to_float32(file.tensor(name), tensor.path)
      added[tensor.path] = tensor.imported(array[:rows])
  return adapter, added


def _fixed(
  file: safetensors_files.File, expected: Mapping[str, np.ndarray]
) -> set[str]:
  """Returns the names of tensors that the adapter has anyway.

  Args:
    file: the file.
    expected: name -> value of those that it may have.

  Raises:
    UserError: one has another value.
  """
  found = expected.keys() & file.names
  for name in sorted(found):
    why = f'its base and {peft_folder.CONFIG} ask'
    file.check(name, expected[name].shape, why)
    array = checkpoint_files.to_float32(file.tensor(name), name)
    # Processors without fused multiply-add round in another way.
    if not np.allclose(array, expected[name], rtol=0, atol=1e-6):
      raise UserError(
        f'{file.path}: tensor {name} is not what PEFT draws for this'
        f' {peft_folder.CONFIG}: merge the adapter into its base with'
        ' peft, merge_and_unload()'
      )
  return found


def _layout(
  adapter: adapters.Adapter, modules: Collection[str], base: peft.Base
) -> dict[str, peft.Tensor]:
  """Returns the file's name of each tensor of the adapted modules -> it."""
  return {
    f'{peft_folder.PREFIX}{base.names[tensor.module]}.{tensor.name}'
    if tensor.module
    else tensor.name: tensor
    for tensor in adapter.peft_tensors(modules, base)
  }
