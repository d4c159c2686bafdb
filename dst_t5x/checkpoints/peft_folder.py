"""What all folders in the format of Hugging Face PEFT have in common.

A folder holds adapter_config.json and adapter_model.safetensors. What we know
besides, which seed the adapter belongs to and its step, stands in the metadata
of the safetensors file, where PEFT does not look.
"""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from etils import epath
import numpy as np
from safetensors import numpy as safetensors_numpy

from dst_t5x.adapters import api as adapters
from dst_t5x.adapters import peft
from dst_t5x.checkpoints import checkpoint_files
from dst_t5x.checkpoints import safetensors_files
from dst_t5x.core import json_object
from dst_t5x.core import json_text
from dst_t5x.core import object_stores
from dst_t5x.core import parts
from dst_t5x.core.errors import UserError
from dst_t5x.models import families

PyTree = Any

CONFIG = 'adapter_config.json'
WEIGHTS_FILE = 'adapter_model.safetensors'
# Before the names of the base's modules.
PREFIX = 'base_model.model.'
_PICKLE = 'adapter_model.bin'
_OURS = 'dst_t5x'  # In the metadata.


class About(NamedTuple):
  """What a folder says of its adapter besides the adapter itself.

  Attributes:
    base: name or folder of the model that it belongs to.
    seed: that model as a run refers to it, with its fingerprint; None if the
      folder is not ours.
    step: of training; 0 if unknown.
  """

  base: str
  seed: dict[str, Any] | None
  step: int


def is_adapter(path: epath.PathLike) -> bool:
  """Whether a folder holds an adapter in PEFT's format."""
  return (epath.Path(path) / CONFIG).exists()


def kind(path: epath.PathLike) -> str:
  """Returns PEFT's name of a folder's kind of adapter; '' if it states none.

  Raises:
    UserError: adapter_config.json is missing or damaged.
  """
  return json_object.read(epath.Path(path) / CONFIG).get('peft_type', str, '')


def write(
  path: epath.PathLike,
  tensors: Mapping[str, np.ndarray],
  stated: Mapping[str, Any],
  base: PyTree,
  seed: Mapping[str, Any],
  step: int,
  replace: bool = False,
) -> None:
  """Writes a folder for `peft.PeftModel.from_pretrained`.

  Args:
    path: the folder.
    tensors: of the adapter, by PEFT's names.
    stated: what adapter_config.json says of the adapter itself.
    base: the parameters of the model that it belongs to, unstacked, or their
      shapes.
    seed: that model as a run refers to it: `path`, `format`, `step` and
      `fingerprint`.
    step: of training.
    replace: whether it takes the place of a folder that is there.

  Raises:
    UserError: the folder exists and must not, or cannot be written.
  """
  stated = {
    **stated,
    'base_model_name_or_path': seed['path'],
    'inference_mode': True,
    'task_type': families.of(base).task_type,
  }
  ours = json_text.dumps({'seed': dict(seed), 'step': step})
  metadata = {'format': 'pt', _OURS: ours}
  with checkpoint_files.new_folder(epath.Path(path), replace) as folder:
    content = safetensors_numpy.save(dict(tensors), metadata)
    (folder / WEIGHTS_FILE).write_bytes(content)
    # Last: without it the folder is no adapter.
    text = json_text.dumps(stated, indent=2) + '\n'
    (folder / CONFIG).write_text(text)


def about(path: epath.PathLike) -> About:
  """Returns what a folder says besides.

  Raises:
    UserError: a file is missing or damaged.
  """
  folder = epath.Path(path)
  stated = json_object.read(folder / CONFIG)
  base = stated.get('base_model_name_or_path', str, '')
  with safetensors_files.opened(weights(folder)) as file:
    text = file.metadata.get(_OURS)
  if text is None:
    return About(base, None, 0)
  ours = json_object.parse(text, f'{_OURS} in the metadata of {file.path}')
  return About(base, ours.inner('seed').content, ours.get('step', int))


def base_path(
  folder: epath.Path, about: About, given: str | None = None
) -> str:
  """Returns the path of the model that an adapter belongs to.

  Args:
    folder: that of the adapter.
    about: what it says.
    given: the path that the user names, instead of the stated one.

  Raises:
    UserError: it is no folder, or may not be loaded.
  """
  path = given or about.base
  if path and not given:
    object_stores.stated_path(
      path, folder, 'its base', 'set INITIAL_CHECKPOINT_PATH'
    )
  if not path or not (given or epath.Path(path).is_dir()):
    raise UserError(
      f'the base of {folder}, {json_object.shown(path)}, is no folder: set'
      ' INITIAL_CHECKPOINT_PATH to that of the base, or write it into'
      ' adapter_config.json as base_model_name_or_path'
    )
  if checkpoint_files.absolute(path) == checkpoint_files.absolute(folder):
    raise UserError(f'{folder} is an adapter and cannot be its own base')
  return path


def weights(folder: epath.Path) -> epath.Path:
  """Returns the file of tensors.

  Raises:
    UserError: there is a pickle instead.
  """
  if not (folder / WEIGHTS_FILE).exists() and (folder / _PICKLE).exists():
    raise UserError(
      f'{folder} has only {_PICKLE}, a pickle, which is not read: load it with'
      ' peft and save it again with save_pretrained'
    )
  return folder / WEIGHTS_FILE


def base_of(params: PyTree) -> peft.Base:
  """Returns what an adapter has to know of the model that it belongs to."""
  flat = parts.flatten(params)
  family = families.of_paths(flat)
  shapes = {
    path.removesuffix(f'/{adapters.KERNEL}'): leaf.shape
    for path, leaf in flat.items()
    if path.endswith(f'/{adapters.KERNEL}')
  }
  tables = [p for p in flat if p.rpartition('/')[2] == adapters.TABLE]
  return peft.Base(
    {path: family.linear_map(path) for path in shapes},
    shapes,
    {path.rpartition('/')[0]: flat[path].shape for path in tables},
  )


def adapted(tensors: Collection[str], base: peft.Base) -> set[str]:
  """Returns the paths of the base's linear maps that have tensors."""
  return {
    path
    for path, name in base.names.items()
    if any(tensor.startswith(f'{PREFIX}{name}.') for tensor in tensors)
  }


def copies(
  file: safetensors_files.File, base: Mapping[str, Any], of: peft.Base
) -> set[str]:
  """Returns the names of tensors that are the base's own.

  Beside an adapter of the output projection, PEFT saves the matrix itself.

  Raises:
    UserError: one is another than the base's.
  """
  copies = {
    f'{PREFIX}{name}.base_layer.weight': f'{path}/{adapters.KERNEL}'
    for path, name in of.names.items()
  }
  found = copies.keys() & file.names
  for name in sorted(found):
    array = checkpoint_files.to_float32(file.tensor(name), name)
    if not np.array_equal(array.T, np.asarray(base[copies[name]])):
      raise UserError(
        f'{file.path}: tensor {name} is not that of the base: merge the adapter'
        ' into its base with peft, merge_and_unload()'
      )
  return found


def check_names(
  folder: epath.Path, layout: Collection[str], found: Collection[str]
) -> None:
  """Refuses superfluous and missing tensors."""
  extra = sorted(set(found) - set(layout))
  if extra:
    hint = safetensors_files.prefix_hint(found, layout)
    hint = hint or safetensors_files.prefix_hint(
      [name.removeprefix(PREFIX) for name in found],
      [name.removeprefix(PREFIX) for name in layout],
    )
    raise UserError(
      f'{folder} has a tensor that has no place in its base by {CONFIG}:'
      f' {extra[0]} ({len(extra)} in all){hint}'
    )
  missing = sorted(set(layout) - set(found))
  if missing:
    raise UserError(
      f'{folder} lacks tensor {missing[0]}, for which {CONFIG} asks'
      f' ({len(missing)} missing)'
    )
