"""Hugging Face's folders of models, read tensor by tensor with safetensors.

The fingerprint of a folder is cached, in `$DST_CACHE_DIR` or
`~/.cache/dst_t5x`, together with the states of the files that it is of.
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import hashlib
import os
import pathlib
import re
import time
from typing import Any

import safetensors
import torch

import dst_t5x
from dst_t5x.core import json_text
from dst_t5x.core import whole_files
from dst_t5x.core.errors import UserError, first_line
from dst_t5x.models import hf_places
from dst_t5x.subsets import definition
from dst_t5x.subsets.torch import base_hash
from dst_t5x.subsets.torch.tensors import Tensor
from dst_t5x.subsets.torch.tensors import check

# Another version may know more families, and find other paths in a folder.
_VERSION = dst_t5x.__version__
_CONFIG = 'config.json'
_WEIGHTS = 'model.safetensors'
_SHARDS = 'model.safetensors.index.json'
_FILE = re.compile(r'[^/\\\0-\x1f]+\.safetensors')
_DTYPES = ('BF16', 'F16', 'F32', 'F64')
# Of masks and position ids, which some files hold besides the weights.
_NO_WEIGHTS = ('BOOL', 'I64')

# Longer than one tick of the clock of any usual file system: a file that
# changed just now can change again without a trace.
_SETTLED_SECONDS = 2.0

Folder = str | os.PathLike[str]


def tensors(folder: Folder) -> dict[str, Tensor]:
  """Returns the tensors of a folder; reads headers only.

  Raises:
    UserError: a file is missing or damaged, a tensor is in two files, or two
      tensors differ that are one in the seed.
  """
  root = pathlib.Path(folder).expanduser()
  found: dict[str, Tensor] = {}
  for file in _files(root):
    for tensor in _tensors_of(file):
      if tensor.name in found:
        raise UserError(f'{root}: tensor {tensor.name} is in two files')
      found[tensor.name] = tensor
  config = _json(root / _CONFIG) if (root / _CONFIG).exists() else {}
  places = hf_places.places(found.keys(), hf_places.tied_by(config))
  for copy, name in places.copies.items():
    if not torch.equal(found[copy].read(), found[name].read()):
      raise UserError(f'{root}: tensor {copy} differs from {name}')
  return {
    path: dataclasses.replace(found[name], transposed=transposed)
    for path, (name, transposed) in places.tensors.items()
  }


def fingerprint(folder: Folder) -> str:
  """Returns the fingerprint of a folder's model in float32, perhaps cached.

  Raises:
    UserError: see `tensors`.
  """
  root = pathlib.Path(folder).expanduser().resolve()
  begun, states = time.time_ns(), _states(root)
  cache = _cache_of(root)
  with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
    known = json_text.loads(cache.read_bytes())
    is_of = known['states'] == states and known['version'] == _VERSION
    if is_of and isinstance(known['fingerprint'], str):
      return known['fingerprint']
  found = base_hash.of_tensors(tensors(root))
  newest = max(max(state[1:3]) for state in states.values())
  is_settled = begun - newest >= 10**9 * _SETTLED_SECONDS
  # What changed in the meantime is not what was read.
  if is_settled and states == _states(root):
    with contextlib.suppress(OSError):  # It is computed again next time.
      cache.parent.mkdir(parents=True, exist_ok=True)
      content = {
        'folder': str(root),
        'states': states,
        'version': _VERSION,
        'fingerprint': found,
      }
      whole_files.write_text(cache, json_text.dumps(content) + '\n')
  return found


def check_seed(folder: Folder, subset: definition.Subset) -> dict[str, Tensor]:
  """Returns the tensors of a folder, which is a subset's seed.

  Raises:
    UserError: see `tensors`; or it is another model.
  """
  found = tensors(folder)
  check(found, subset.tensors, str(folder))
  if subset.fingerprint is None:
    return found
  if set(base_hash.names_of(subset.tensors).values()) <= {'float32'}:
    definition.check_fingerprint(subset, fingerprint(folder))
  else:
    of_types = base_hash.of_tensors(found, subset.tensors)
    definition.check_fingerprint(subset, of_types)
  return found


def _cache_of(root: pathlib.Path) -> pathlib.Path:
  folder = os.environ.get('DST_CACHE_DIR') or '~/.cache/dst_t5x'
  name = hashlib.sha256(str(root).encode()).hexdigest()
  return pathlib.Path(folder).expanduser() / 'fingerprints' / f'{name}.json'


def _states(root: pathlib.Path) -> dict[str, list[int]]:
  """Returns what differs after a file has been changed, for each file."""
  names = [path for path in (root / _CONFIG, root / _SHARDS) if path.exists()]
  return {
    path.name: [s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino]
    for path in [*_files(root), *names]
    for s in [path.stat()]
  }


def _files(root: pathlib.Path) -> list[pathlib.Path]:
  """Returns the files that hold tensors; the one file goes before an index."""
  if (root / _WEIGHTS).exists():
    return [root / _WEIGHTS]
  if not (root / _SHARDS).exists():
    pickle = ', only a pickle' if list(root.glob('*.bin')) else ''
    raise UserError(f'{root} has no {_WEIGHTS}{pickle}')
  weight_map = _json(root / _SHARDS).get('weight_map')
  names = set(weight_map.values()) if isinstance(weight_map, dict) else {None}
  for name in names:
    # It names a file of this folder and nothing else.
    if not isinstance(name, str) or not _FILE.fullmatch(name):
      raise UserError(
        f'{root / _SHARDS} names {ascii(name)[:60]}, which is no safetensors '
        'file of this folder'
      )
    if not (root / name).exists():
      raise UserError(f'{root / name} is missing')
  return [root / name for name in sorted(map(str, names))]


def _json(path: pathlib.Path) -> dict[str, Any]:
  try:
    content = json_text.loads(path.read_bytes())
  except (OSError, ValueError) as e:
    raise UserError(f'cannot read {path}: {first_line(e)}') from e
  if not isinstance(content, dict):
    raise UserError(f'{path} holds no JSON object')
  return content


def _tensors_of(path: pathlib.Path) -> Iterator[Tensor]:
  """Yields the weights in a file."""
  with _one_line(path):
    file = safetensors.safe_open(str(path), framework='pt')
    for name in file.keys():  # noqa: SIM118 (It is no dict.)
      if not name.isprintable():
        raise UserError(f'{path} has a tensor with the name {name[:60]!a}')
      view = file.get_slice(name)
      if (dtype := view.get_dtype()) in _NO_WEIGHTS:
        continue
      if dtype not in _DTYPES:
        raise UserError(
          f'tensor {name} of {path} is {dtype}, perhaps quantised; a subset '
          f'needs {", ".join(_DTYPES)}'
        )
      shape, reader = tuple(view.get_shape()), _Reader(path, name)
      yield Tensor(name, shape, False, reader, memory=name)


class _Reader:
  """Reads one tensor of a file, which is mapped into memory."""

  def __init__(self, path: pathlib.Path, name: str) -> None:
    self._path, self._name = path, name

  def __call__(self) -> torch.Tensor:
    with (
      _one_line(self._path),
      safetensors.safe_open(str(self._path), framework='pt') as file,
    ):
      return file.get_tensor(self._name)


@contextlib.contextmanager
def _one_line(path: pathlib.Path) -> Iterator[None]:
  """Turns errors of reading a file into UserErrors of one line."""
  try:
    yield
  except (OSError, safetensors.SafetensorError) as e:
    raise UserError(
      f'{path} is truncated or damaged, or no safetensors file: {first_line(e)}'
    ) from e
