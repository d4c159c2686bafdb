"""Subsets as SHiRA adapters of Hugging Face PEFT, read and written.

SHiRA (Bhardwaj et al. 2024, arXiv:2406.13175) adds sparse deltas to linear
maps. In PEFT's files, a map of [out, in] has two tensors, in which n is
r · (in + out) with one r for all maps:

    shira_weight    float [n], the deltas
    shira_indices   int32 [2, n], their rows and columns

A subset has values instead, anywhere in the model, and any number of them. So
only a subset of linear maps can be written. Its maps are filled up to n with
deltas of -0.0, which change no bit (0.0 would change the seed's -0.0). The
delta is float32(θ - θ⁰), and float32(θ⁰ + delta) is not always θ.
"""

from collections.abc import Collection, Mapping
import re
from typing import Any, NamedTuple

from etils import epath
import numpy as np

from dst_t5x.adapters import api as adapters
from dst_t5x.adapters import peft
from dst_t5x.checkpoints import checkpoint_files
from dst_t5x.checkpoints import peft_config
from dst_t5x.checkpoints import peft_folder
from dst_t5x.checkpoints import peft_targets
from dst_t5x.checkpoints import places
from dst_t5x.checkpoints import safetensors_files
from dst_t5x.core import hub
from dst_t5x.core import json_object
from dst_t5x.core import parts
from dst_t5x.core import tree_paths
from dst_t5x.core.errors import UserError
from dst_t5x.models import families
from dst_t5x.subsets import extraction

PyTree = Any

_TENSORS = _WEIGHT, _INDICES = 'shira_weight', 'shira_indices'
_DEFAULT_RANK = 32  # PEFT's.
# On Windows, PEFT saves indices as float32.
_INDEX_DTYPES = ('I32', 'I64', 'F32')


class Summary(NamedTuple):
  """What was written.

  Attributes:
    values: number of the subset's values.
    maps: number of linear maps that have them.
    rank: SHiRA's r.
    padding: number of deltas of -0.0.
    lost: number of values for which float32(θ⁰ + delta) is not θ.
    error: the largest difference of the two.
  """

  values: int
  maps: int
  rank: int
  padding: int
  lost: int
  error: float

  def __str__(self) -> str:
    """Returns it in words, for a line."""
    lost = f'{self.lost:,} of them come back rounded'
    if self.lost:
      lost += f', by at most {self.error:.1e}'
    return (
      f'SHiRA, {self.values:,} values in {self.maps} linear maps, r ='
      f' {self.rank}, {self.padding:,} zeros; {lost}'
    )


class _Deltas(NamedTuple):
  """The deltas of a linear map.

  Attributes:
    rows: int64 [n], outputs.
    columns: int64 [n], inputs.
    values: float32 [n].
  """

  rows: np.ndarray
  columns: np.ndarray
  values: np.ndarray


def is_adapter(path: epath.PathLike) -> bool:
  """Returns whether a path is a folder with a SHiRA adapter.

  Raises:
    UserError: its adapter_config.json is damaged, or a bucket is not reached.
  """
  if hub.is_path(path):
    return False
  with places.reached(path):
    folder = epath.Path(path).expanduser()
    return (
      peft_folder.is_adapter(folder)
      and peft_folder.kind(folder) == peft_config.SHIRA
    )


def save(
  path: epath.PathLike,
  subset: extraction.Subset,
  params: PyTree,
  seed: Mapping[str, Any],
  step: int,
) -> Summary:
  """Writes a subset for `peft.PeftModel.from_pretrained`.

  Args:
    path: the new folder.
    subset: one of the seed, see `extraction.check_seed`.
    params: the seed's parameters, unstacked, float32.
    seed: the seed as a run refers to it, see `seeds.Seed.reference`.
    step: of training.

  Raises:
    UserError: the subset changes other tensors than linear maps, which are
      listed, or more of a map than SHiRA can; or the folder exists already or
      cannot be written.
  """
  base, flat = peft_folder.base_of(params), parts.flatten(params)
  counts = _counts(subset, base)
  rank = _rank(counts, base)
  tensors: dict[str, np.ndarray] = {}
  lost, error = 0, 0.0
  for module in counts:
    kernel = np.asarray(flat[_kernel(module)])
    positions, new = extraction.entries(subset, _kernel(module))
    old = kernel.reshape(-1)[positions]
    columns, rows = np.divmod(positions, kernel.shape[1])
    deltas = _Deltas(rows, columns, _difference(module, new, old))
    again = old + deltas.values
    lost += int((extraction.bits(again) != extraction.bits(new)).sum())
    error = max(error, float(np.abs(again - new).max()))
    tensors |= _exported(base.names[module], deltas, kernel.shape, rank)
  stated = {
    'peft_type': peft_config.SHIRA,
    'target_modules': peft_config.target_modules(counts, base),
    'r': rank,
    # PEFT then draws a mask, which the file's indices replace. It would warn of
    # any other.
    'mask_type': 'random',
  }
  peft_folder.write(path, tensors, stated, params, seed, step)
  values = sum(counts.values())
  padding = sum(rank * sum(base.shapes[module]) for module in counts) - values
  return Summary(values, len(counts), rank, padding, lost, error)


def load(path: epath.PathLike, params: PyTree) -> tuple[PyTree, str]:
  """Returns a base with the deltas of a SHiRA adapter, which may be PEFT's own.

  The parameters are those of PEFT's `merge_and_unload`, bit for bit, if the
  base is in float32 there.

  Args:
    path: the folder.
    params: the base's parameters, unstacked, float32; they are not changed.

  Returns:
    The parameters, and what to tell about their values.

  Raises:
    UserError: a file is missing or damaged, the adapter has an option that is
      not known here, or it does not fit the base.
  """
  folder = epath.Path(path)
  stated = json_object.read(folder / peft_folder.CONFIG)
  base, flat = peft_folder.base_of(params), dict(parts.flatten(params))
  total = changed = lost = 0
  with safetensors_files.opened(peft_folder.weights(folder)) as file:
    modules = _adapted(stated, file, params, base)
    names = {_name(base.names[m], t) for m in modules for t in _TENSORS}
    own = file.names - peft_folder.copies(file, flat, base)
    peft_folder.check_names(folder, names, own)
    rank = stated.size('r', _DEFAULT_RANK)
    for module in sorted(modules):
      kernel = np.array(flat[_kernel(module)], order='C')
      deltas = _imported(file, base.names[module], kernel.shape, rank)
      where = deltas.columns, deltas.rows
      old = kernel[where]
      with np.errstate(over='ignore', invalid='ignore'):
        kernel[where] += deltas.values
        lost += int((kernel[where] - old != deltas.values).sum())
      new = kernel[where]
      changed += int((extraction.bits(new) != extraction.bits(old)).sum())
      flat[_kernel(module)] = kernel
      total += len(old)
  note = (
    f'{total:,} deltas of SHiRA: {changed:,} change a value, {lost:,} are'
    ' rounded when added'
  )
  return parts.unflatten(flat), note


def _kernel(module: str) -> str:
  return f'{module}/{adapters.KERNEL}'


def _name(module: str, tensor: str) -> str:
  """Returns the file's name of a tensor of a module, which has PEFT's name."""
  return f'{peft_folder.PREFIX}{module}.{tensor}'


def _counts(subset: extraction.Subset, base: peft.Base) -> dict[str, int]:
  """Returns path of each linear map with a value -> number of them.

  Raises:
    UserError: the subset is empty, or changes other tensors.
  """
  counts = {path: len(p) for path, p in subset.positions.items() if len(p)}
  known = {_kernel(m): m for m, shape in base.shapes.items() if len(shape) == 2}
  if others := sorted(counts.keys() - known.keys()):
    raise UserError(
      f'SHiRA changes linear maps only, and this subset also changes'
      f' {len(others)} other tensors: {", ".join(_with_layers(others))}; write'
      ' the whole model with --format=hf'
    )
  if not counts:
    raise UserError(
      'the subset changes nothing, and SHiRA has no empty adapter'
    )
  return {known[path]: counts[path] for path in sorted(counts)}


def _with_layers(paths: Collection[str]) -> list[str]:
  """Returns paths, those that differ in the layer only as one."""
  layers: dict[str, list[str]] = {}
  for path in paths:
    stacked, layer = tree_paths.stacked_path(path) or (path, '')
    layers.setdefault(stacked, []).append(layer)
  return [
    re.sub(
      rf'(^|/){tree_paths.STACK}/',
      rf'\1{tree_paths.STACK}_{{{",".join(sorted(numbers, key=int))}}}/',
      stacked,
      count=1,
    )
    if numbers != ['']
    else stacked
    for stacked, numbers in layers.items()
  ]


def _rank(counts: Mapping[str, int], base: peft.Base) -> int:
  """Returns the least r with which every map has room for its values.

  Raises:
    UserError: PEFT refuses it, because a map has fewer than r · (in + out)
      parameters.
  """
  ranks = {m: -(-n // sum(base.shapes[m])) for m, n in counts.items()}
  largest = max(ranks, key=lambda m: ranks[m])
  rank = ranks[largest]
  for module in counts:
    inputs, outputs = base.shapes[module]
    if rank * (inputs + outputs) > inputs * outputs:
      raise UserError(
        f'{counts[largest]:,} values of {_kernel(largest)} need SHiRA with r ='
        f' {rank}, and PEFT refuses r · (in + out) > in · out, as for'
        f' {_kernel(module)} of {inputs} · {outputs}; write the whole model'
        ' with --format=hf'
      )
  return rank


def _difference(module: str, new: np.ndarray, old: np.ndarray) -> np.ndarray:
  with np.errstate(over='ignore'):
    difference = new - old
  if not np.isfinite(difference).all():
    raise UserError(
      f'a difference from the seed in {_kernel(module)} overflows'
    )
  return difference


def _exported(
  name: str, deltas: _Deltas, shape: tuple[int, ...], rank: int
) -> dict[str, np.ndarray]:
  """Returns the tensors of a module, sorted by position and filled up.

  Args:
    name: PEFT's name of the module.
    deltas: [k], any order.
    shape: [in, out].
    rank: r, with r · (in + out) >= k.
  """
  inputs, total = shape[0], rank * sum(shape)
  positions = deltas.rows * inputs + deltas.columns
  unused = np.setdiff1d(np.arange(total), positions)[: total - len(positions)]
  positions = np.concatenate([positions, unused])
  zeros = np.full(len(unused), -0.0, np.float32)
  order = np.argsort(positions)
  indices = np.stack(np.divmod(positions[order], inputs))
  return {
    _name(name, _WEIGHT): np.concatenate([deltas.values, zeros])[order],
    _name(name, _INDICES): indices.astype(np.int32),
  }


def _adapted(
  stated: json_object.JsonObject,
  file: safetensors_files.File,
  params: PyTree,
  base: peft.Base,
) -> set[str]:
  """Returns the paths of the linear maps that an adapter changes.

  Raises:
    UserError: an option is not known here, or fits no map.
  """
  try:
    peft_config.check_options(stated)
  except UserError as e:
    raise UserError(f'{stated.where}: {e}') from e
  if stated.content.get('target_modules') is None:
    raise UserError(f"{stated.where} lacks 'target_modules'")
  found = peft_folder.adapted(file.names, base)
  return peft_targets.adapted(stated, families.of(params), base.names, found)


def _imported(
  file: safetensors_files.File, name: str, shape: tuple[int, ...], rank: int
) -> _Deltas:
  """Returns the deltas of a module.

  Args:
    file: of the adapter.
    name: PEFT's name of the module.
    shape: [in, out].
    rank: r.

  Raises:
    UserError: a tensor is misshapen, or indices are outside of the map or
      appear twice.
  """
  asks = f'its base and {peft_folder.CONFIG} ask'
  weight, indices = (_name(name, tensor) for tensor in _TENSORS)
  file.check(weight, (rank * sum(shape),), asks)
  file.check(indices, (2, rank * sum(shape)), asks, _INDEX_DTYPES)
  values = checkpoint_files.to_float32(file.tensor(weight), weight)
  found = file.tensor(indices)
  limits = np.array([[shape[1]], [shape[0]]])
  if not ((found >= 0) & (found < limits) & (found == np.floor(found))).all():
    raise UserError(
      f'{file.path}: tensor {indices} has an index outside of the map, which is'
      f' {shape[1]} · {shape[0]}'
    )
  rows, columns = found.astype(np.int64)
  if len(np.unique(rows * shape[0] + columns)) < len(rows):
    raise UserError(f'{file.path}: tensor {indices} has a position twice')
  return _Deltas(rows, columns, values)
