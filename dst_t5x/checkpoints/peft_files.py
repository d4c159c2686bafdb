"""Adapters in the format of Hugging Face PEFT, read and written without torch.

A folder holds adapter_config.json and adapter_model.safetensors. What differs
from ours: linear maps are [out, in] there and [in, out] here, modules have
other names (`hf_names`), and what is adapted is a list of modules' names, or of
their ends, where we have a regular expression.

What we know besides, which seed the adapter belongs to and its step, stands in
the metadata of the safetensors file, where PEFT does not look.
"""

from collections.abc import Collection, Mapping
import re
from typing import Any, NamedTuple

from etils import epath
import numpy as np
from safetensors import numpy as safetensors_numpy

from dst_t5x.adapters import api as adapters
from dst_t5x.adapters import ia3
from dst_t5x.adapters import lora
from dst_t5x.adapters import prompts
from dst_t5x.checkpoints import checkpoint_files
from dst_t5x.checkpoints import peft_config
from dst_t5x.checkpoints import peft_targets
from dst_t5x.checkpoints import safetensors_files
from dst_t5x.core import json_object
from dst_t5x.core import json_text
from dst_t5x.core import parts
from dst_t5x.core.errors import UserError
from dst_t5x.models.t5 import hf_names

PyTree = Any

_CONFIG = 'adapter_config.json'
WEIGHTS_FILE = 'adapter_model.safetensors'
_PICKLE = 'adapter_model.bin'
_OURS = 'dst_t5x'  # In the metadata.

_PROMPT = 'prompt_embeddings'
_PREFIX = 'base_model.model.'
_LEAVES = {
  'lora_a': 'lora_A.weight',
  'lora_b': 'lora_B.weight',
  'ia3': 'ia3_l',
}
_LINEAR = re.compile(rf'{_PREFIX}(.+)\.({"|".join(_LEAVES.values())})')


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


class _Tensor(NamedTuple):
  """A tensor of the file: its path in our tree, and its shape there."""

  path: str
  shape: tuple[int, ...]

  @property
  def _is_transposed(self) -> bool:
    return bool(re.fullmatch(lora.LoRA.added, self.path))

  def exported(self, array: np.ndarray) -> np.ndarray:
    """Returns the array as the file has it, float32."""
    array = np.asarray(array, np.float32)
    array = array.T if self._is_transposed else array
    return np.ascontiguousarray(array.reshape(self.shape))

  def imported(self, array: np.ndarray) -> np.ndarray:
    """Returns the array as we have it, float32, a copy."""
    array = checkpoint_files.to_float32(array, self.path)
    if self._is_transposed:
      array = array.T
    elif re.fullmatch(ia3.IA3.added, self.path):
      array = array.ravel()
    return np.array(array, order='C')


def is_known(adapter: adapters.Adapter) -> bool:
  """Whether PEFT has this kind of adapter."""
  return isinstance(adapter, lora.LoRA | ia3.IA3 | prompts.Prompt)


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
    adapter: LoRA, (IA)³ or a prompt.
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
  known = _linear_maps(base)
  modules = {path.rpartition('/')[0] for path in added} & set(known)
  layout = _layout(adapter, modules, base)
  tensors = {
    name: tensor.exported(added[tensor.path]) for name, tensor in layout.items()
  }
  stated = {
    **peft_config.export(adapter, modules, known),
    'base_model_name_or_path': seed['path'],
    'inference_mode': True,
    'task_type': 'SEQ_2_SEQ_LM',
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
  known = _linear_maps(base)
  with safetensors_files.opened(_weights(folder)) as file:
    modules = peft_targets.adapted(stated, known, _adapted(file.names, known))
    try:
      adapter = peft_config.read(stated, modules, known)
    except UserError as e:
      raise UserError(f'{stated.where}: {e}') from e
    layout = _layout(adapter, modules, base)
    _check_names(folder, layout, file.names)
    added = {}
    for name, tensor in layout.items():
      rows = tensor.shape[0]
      # PEFT makes a second half of a prompt for the decoder, but never looks
      # at it.
      if name == _PROMPT and file.shape(name)[:1] == (2 * rows,):
        tensor = tensor._replace(shape=(2 * rows, tensor.shape[1]))
      file.check(name, tensor.shape, f'its base and {_CONFIG} ask')
      array = file.tensor(name)
      added[tensor.path] = tensor.imported(array[:rows])
  return adapter, added


def _weights(folder: epath.Path) -> epath.Path:
  if not (folder / WEIGHTS_FILE).exists() and (folder / _PICKLE).exists():
    raise UserError(
      f'{folder} has only {_PICKLE}, a pickle, which is not read: load it with'
      ' peft and save it again with save_pretrained'
    )
  return folder / WEIGHTS_FILE


def _linear_maps(base: PyTree) -> dict[str, tuple[int, int]]:
  """Returns the path of each linear map -> [n, features]."""
  return {
    path.removesuffix('/kernel'): leaf.shape
    for path, leaf in parts.flatten(base).items()
    if path.endswith('/kernel')
  }


def _adapted(tensors: Collection[str], known: Collection[str]) -> set[str]:
  """Returns the paths of the base's linear maps that have tensors."""
  ours = {hf_names.linear_map(path): path for path in known}
  found = (_LINEAR.fullmatch(name) for name in tensors)
  return {ours[m[1]] for m in found if m and m[1] in ours}


def _layout(
  adapter: adapters.Adapter, modules: Collection[str], base: PyTree
) -> dict[str, _Tensor]:
  """Returns the file's name of each tensor of the adapted modules -> it."""
  if isinstance(adapter, prompts.Prompt):
    width = base['token_embedder']['embedding'].shape[1]
    return {_PROMPT: _Tensor(prompts.PATH, (adapter.length, width))}
  known = _linear_maps(base)
  layout = {}
  for module in sorted(modules):
    n, features = known[module]
    shapes: dict[str, tuple[int, int]]
    if isinstance(adapter, lora.LoRA):
      shapes = {'lora_a': (adapter.rank, n), 'lora_b': (features, adapter.rank)}
    elif re.fullmatch(ia3.INPUTS, module):
      shapes = {'ia3': (1, n)}
    else:
      shapes = {'ia3': (features, 1)}
    for leaf, shape in shapes.items():
      name = f'{_PREFIX}{hf_names.linear_map(module)}.{_LEAVES[leaf]}'
      layout[name] = _Tensor(f'{module}/{leaf}', shape)
  return layout


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
