"""Adapters in the format of Hugging Face PEFT, read and written without torch.

A folder holds adapter_config.json and adapter_model.safetensors. What differs
from ours: linear maps are [out, in] there and [in, out] here, modules have the
names of the base's family, and what is adapted is a list of modules' names, or
of their ends, where we have a regular expression. An adapter says itself what
PEFT calls it and its tensors, see `adapters.peft`.

What we know besides, which seed the adapter belongs to and its step, stands in
the metadata of the safetensors file, where PEFT does not look.
"""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from etils import epath
import numpy as np
from safetensors import numpy as safetensors_numpy

from dst_t5x.adapters import api as adapters
from dst_t5x.adapters import peft
from dst_t5x.checkpoints import checkpoint_files
from dst_t5x.checkpoints import peft_config
from dst_t5x.checkpoints import peft_targets
from dst_t5x.checkpoints import safetensors_files
from dst_t5x.core import json_object
from dst_t5x.core import json_text
from dst_t5x.core import parts
from dst_t5x.core.errors import UserError
from dst_t5x.models import families

PyTree = Any

_CONFIG = 'adapter_config.json'
WEIGHTS_FILE = 'adapter_model.safetensors'
_PICKLE = 'adapter_model.bin'
_OURS = 'dst_t5x'  # In the metadata.

_PREFIX = 'base_model.model.'


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


def is_known(adapter: adapters.Adapter) -> bool:
  """Whether PEFT has this kind of adapter."""
  return bool(adapter.peft_type)


def is_adapter(path: epath.PathLike) -> bool:
  """Whether a folder holds an adapter in PEFT's format."""
  return (epath.Path(path) / _CONFIG).exists()


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
    added: path -> its parameters, layers one by one.
    base: the parameters of the model that it belongs to, unstacked, or their
      shapes.
    seed: that model as a run refers to it: `path`, `format`, `step` and
      `fingerprint`.
    step: of training.
    replace: whether it takes the place of a folder that is there.

  Raises:
    UserError: the folder exists and must not, or cannot be written.
  """
  of = _base(base)
  modules = {path.rpartition('/')[0] for path in added} & set(of.names)
  layout = _layout(adapter, modules, of)
  tensors = {
    name: tensor.exported(added[tensor.path]) for name, tensor in layout.items()
  }
  stated = {
    **peft_config.export(adapter, modules, of),
    'base_model_name_or_path': seed['path'],
    'inference_mode': True,
    'task_type': families.of(base).task_type,
  }
  ours = json_text.dumps({'seed': dict(seed), 'step': step})
  metadata = {'format': 'pt', _OURS: ours}
  with checkpoint_files.new_folder(epath.Path(path), replace) as folder:
    content = safetensors_numpy.save(tensors, metadata)
    (folder / WEIGHTS_FILE).write_bytes(content)
    # Last: without it the folder is no adapter.
    text = json_text.dumps(stated, indent=2) + '\n'
    (folder / _CONFIG).write_text(text)


def about(path: epath.PathLike) -> About:
  """Returns what a folder says besides.

  Raises:
    UserError: a file is missing or damaged.
  """
  folder = epath.Path(path)
  stated = json_object.read(folder / _CONFIG)
  base = stated.get('base_model_name_or_path', str, '')
  with safetensors_files.opened(_weights(folder)) as file:
    text = file.metadata.get(_OURS)
  if text is None:
    return About(base, None, 0)
  ours = json_object.parse(text, f'{_OURS} in the metadata of {file.path}')
  return About(base, ours.inner('seed').content, ours.get('step', int))


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
  stated = json_object.read(folder / _CONFIG)
  of, family = _base(base), families.of(base)
  with safetensors_files.opened(_weights(folder)) as file:
    modules = peft_targets.adapted(
      stated, family, of.names, _adapted(file.names, of)
    )
    try:
      adapter = peft_config.read(stated, modules, of)
    except UserError as e:
      raise UserError(f'{stated.where}: {e}') from e
    layout = _layout(adapter, modules, of)
    names = file.names - _copies(file, parts.flatten(base), of)
    _check_names(folder, layout, names)
    added = {}
    for name, tensor in layout.items():
      rows, *rest = tensor.shape
      is_twice = tensor.may_be_twice and file.shape(name)[:1] == (2 * rows,)
      shape = (2 * rows if is_twice else rows, *rest)
      file.check(name, shape, f'its base and {_CONFIG} ask')
      array = checkpoint_files.to_float32(file.tensor(name), tensor.path)
      added[tensor.path] = tensor.imported(array[:rows])
  return adapter, added


def _weights(folder: epath.Path) -> epath.Path:
  if not (folder / WEIGHTS_FILE).exists() and (folder / _PICKLE).exists():
    raise UserError(
      f'{folder} has only {_PICKLE}, a pickle, which is not read: load it with'
      ' peft and save it again with save_pretrained'
    )
  return folder / WEIGHTS_FILE


def _base(params: PyTree) -> peft.Base:
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


def _adapted(tensors: Collection[str], base: peft.Base) -> set[str]:
  """Returns the paths of the base's linear maps that have tensors."""
  return {
    path
    for path, name in base.names.items()
    if any(tensor.startswith(f'{_PREFIX}{name}.') for tensor in tensors)
  }


def _copies(
  file: safetensors_files.File, base: Mapping[str, Any], of: peft.Base
) -> set[str]:
  """Returns the names of tensors that are the base's own.

  Beside an adapter of the output projection, PEFT saves the matrix itself.

  Raises:
    UserError: one is another than the base's.
  """
  copies = {
    f'{_PREFIX}{name}.base_layer.weight': f'{path}/{adapters.KERNEL}'
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


def _layout(
  adapter: adapters.Adapter, modules: Collection[str], base: peft.Base
) -> dict[str, peft.Tensor]:
  """Returns the file's name of each tensor of the adapted modules -> it."""
  return {
    f'{_PREFIX}{base.names[tensor.module]}.{tensor.name}'
    if tensor.module
    else tensor.name: tensor
    for tensor in adapter.peft_tensors(modules, base)
  }


def _check_names(
  folder: epath.Path, layout: Collection[str], found: Collection[str]
) -> None:
  """Refuses superfluous and missing tensors."""
  extra = sorted(set(found) - set(layout))
  if extra:
    hint = safetensors_files.prefix_hint(found, layout)
    hint = hint or safetensors_files.prefix_hint(
      [name.removeprefix(_PREFIX) for name in found],
      [name.removeprefix(_PREFIX) for name in layout],
    )
    raise UserError(
      f'{folder} has a tensor that has no place in its base by {_CONFIG}:'
      f' {extra[0]} ({len(extra)} in all){hint}'
    )
  missing = sorted(set(layout) - set(found))
  if missing:
    raise UserError(
      f'{folder} lacks tensor {missing[0]}, for which {_CONFIG} asks'
      f' ({len(missing)} missing)'
    )
