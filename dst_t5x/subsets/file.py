"""Subset files, version 1; docs/subset_format.md describes them.

A subset file is a safetensors file with five arrays of bytes: the table of the
seed's tensors, two codes of the positions, the values, and the SHA-256 of all
bytes before it. The metadata name the seed. Equal content gives equal files.
"""

from collections.abc import Mapping
import dataclasses
import hashlib
import math
import os
import re
from typing import Any

import numpy as np
import safetensors

from dst_t5x.core import hub
from dst_t5x.core import json_text
from dst_t5x.core import whole_files
from dst_t5x.core.errors import UserError, first_line
from dst_t5x.subsets import content
from dst_t5x.subsets import definition

FORMAT = 'dst_t5x.subset/1'
_CHECKSUM = 'sha256'
CHECKSUM_BYTES = 32
_LENGTH_BYTES = 8
# Limit of the header's size, so that other files are not read as headers.
_MOST_HEADER_BYTES = 2**20
_FINGERPRINT = re.compile('[0-9a-f]{64}')

Arrays = Mapping[str, np.ndarray]


def to_bytes(subset: definition.Subset, about: Mapping[str, Any]) -> bytes:
  """Returns the content of a subset file; see `save`."""
  return pack(content.to_arrays(subset), with_fingerprint(subset, about))


def with_fingerprint(
  subset: definition.Subset, about: Mapping[str, Any]
) -> dict[str, Any]:
  """Returns `about` with the seed's fingerprint.

  Raises:
    UserError: the fingerprint is unknown, or there are two different ones.
  """
  seed = dict(about.get('seed') or {})
  said = {subset.fingerprint, seed.get('fingerprint')} - {None}
  if len(said) != 1:
    raise UserError(
      "subset: a file needs its seed's fingerprint, one: "
      f"about['seed']['fingerprint'] (found: {sorted(map(str, said))})"
    )
  seed['fingerprint'] = said.pop()
  complete = {**about, 'seed': seed}
  if _fingerprint(complete) is None:
    raise UserError(
      "subset: a seed's fingerprint is 64 hexadecimal digits, not "
      f'{seed["fingerprint"]!r}'
    )
  return complete


def pack(arrays: Arrays, about: Mapping[str, Any]) -> bytes:
  """Returns a safetensors file of the arrays, with its checksum at the end."""
  header = header_of({n: a.shape for n, a in arrays.items()}, about)
  parts = [header, *(arrays[name].tobytes() for name in content.NAMES)]
  digest = hashlib.sha256()
  for part in parts:
    digest.update(part)
  return b''.join([*parts, digest.digest()])


def header_of(
  shapes: Mapping[str, tuple[int, ...]], about: Mapping[str, Any]
) -> bytes:
  """Returns the part of the file before the arrays.

  Args:
    shapes: shapes of the four arrays of content.
    about: the metadata.

  Raises:
    UserError: the metadata are too large for a file.
  """
  metadata = {'format': FORMAT, 'about': _json(_plain(about))}
  header: dict[str, Any] = {'__metadata__': metadata}
  offset = 0
  for name, shape in (*shapes.items(), (_CHECKSUM, (CHECKSUM_BYTES,))):
    end = offset + math.prod(shape)
    header[name] = {
      'dtype': 'U8',
      'shape': [*shape],
      'data_offsets': [offset, end],
    }
    offset = end
  text = _json(header).encode()
  text += b' ' * (-len(text) % 8)
  if len(text) > _MOST_HEADER_BYTES:
    raise UserError(
      f'subset: its metadata take {len(text):,} bytes, more than a file can '
      f'hold ({_MOST_HEADER_BYTES:,})'
    )
  return len(text).to_bytes(_LENGTH_BYTES, 'little') + text


def _json(value: Any) -> str:
  return json_text.dumps(value, separators=(',', ':'))


def _plain(value: Any) -> Any:
  """Returns a value in the types of JSON, with sorted keys."""
  if isinstance(value, Mapping):
    return {str(k): _plain(value[k]) for k in sorted(value, key=str)}
  if isinstance(value, (list, tuple)):
    return [_plain(item) for item in value]
  if isinstance(value, np.generic):
    value = value.item()
  if isinstance(value, float) and not math.isfinite(value):
    return None
  if value is None or isinstance(value, (bool, int, float, str)):
    return value
  return str(value)


def from_bytes(blob: bytes) -> tuple[definition.Subset, dict[str, Any]]:
  """Inverse of `to_bytes`.

  Args:
    blob: the content of a file.

  Raises:
    UserError: this is no complete, undamaged subset file of this version.
  """
  subset, about = _unpack(blob)
  if subset.fingerprint is None:
    raise UserError("subset: it does not say its seed's fingerprint")
  return subset, about


def _unpack(blob: bytes) -> tuple[definition.Subset, dict[str, Any]]:
  """Inverse of `pack`."""
  about = _read_about(blob)
  checksum = hashlib.sha256(memoryview(blob)[:-CHECKSUM_BYTES]).digest()
  if checksum != blob[-CHECKSUM_BYTES:]:
    raise UserError('subset: it is damaged or cut short: its checksum is wrong')
  try:
    entries = dict(safetensors.deserialize(blob))
  except safetensors.SafetensorError as e:
    raise UserError(f'subset: it is damaged: {first_line(e)}') from e
  if entries.keys() != {*content.NAMES, _CHECKSUM} or any(
    entry['dtype'] != 'U8' for entry in entries.values()
  ):
    raise UserError('subset: it has not the arrays of a subset file')
  arrays = {
    name: np.frombuffer(entry['data'], np.uint8).reshape(entry['shape'])
    for name, entry in entries.items()
  }
  subset = content.from_arrays(arrays)
  return dataclasses.replace(subset, fingerprint=_fingerprint(about)), about


def _fingerprint(about: Mapping[str, Any]) -> str | None:
  """Returns the seed's fingerprint; None if the metadata lack it."""
  seed = about.get('seed')
  said = seed.get('fingerprint') if isinstance(seed, Mapping) else None
  is_one = isinstance(said, str) and _FINGERPRINT.fullmatch(said)
  return said if is_one else None


def to_arrays(subset: definition.Subset) -> dict[str, np.ndarray]:
  """Returns the subset file as one array, for checkpoints.

  It is one array because Orbax cannot store empty arrays. The checkpoint itself
  names the seed.

  Returns:
    `subset`: uint8 [bytes].

  Raises:
    UserError: see `save`.
  """
  seed = {'fingerprint': subset.fingerprint}
  about = {} if subset.fingerprint is None else {'seed': seed}
  blob = pack(content.to_arrays(subset), about)
  return {'subset': np.frombuffer(blob, np.uint8)}


def from_arrays(arrays: Arrays) -> definition.Subset:
  """Inverse of `to_arrays`.

  Raises:
    UserError: the arrays are no subset, or a damaged one.
  """
  if 'subset' not in arrays:
    raise UserError(
      'subset: the checkpoint holds none, or one of an older version'
    )
  subset, _ = _unpack(np.asarray(arrays['subset'], np.uint8).tobytes())
  return subset


def _header_bytes(start: bytes) -> int:
  """Returns the length of the header, from a file's first bytes."""
  length = int.from_bytes(start[:_LENGTH_BYTES], 'little')
  if len(start) < _LENGTH_BYTES or not 0 < length <= _MOST_HEADER_BYTES:
    raise UserError('subset: it is no subset file')
  return length


def _read_about(start: bytes) -> dict[str, Any]:
  """Returns the metadata, from the beginning of a file.

  Raises:
    UserError: this is no subset file, or one of another version.
  """
  end = _LENGTH_BYTES + _header_bytes(start)
  try:
    metadata = json_text.loads(start[_LENGTH_BYTES:end])['__metadata__']
    about = json_text.loads(metadata.get('about', metadata.get('subset')))
    found = metadata.get('format', about.get('format'))
    name, _, version = found.partition('/')
  except (AttributeError, KeyError, TypeError, ValueError) as e:
    raise UserError('subset: it is no subset file, or damaged') from e
  if name != FORMAT.partition('/')[0]:
    raise UserError('subset: it is no subset file')
  if found != FORMAT:
    raise UserError(
      f'subset: it is of version {version[:20]!r}, this program reads '
      f'{FORMAT.partition("/")[2]}'
    )
  return about


def save(
  path: str | os.PathLike[str],
  subset: definition.Subset,
  about: Mapping[str, Any],
) -> int:
  """Writes a subset file atomically; returns its size in bytes.

  Args:
    path: the file, which may be in an object store; an older one is replaced.
    subset: the subset.
    about: further metadata, see docs/subset_format.md. It needs
      `about['seed']['fingerprint']` unless the subset has the fingerprint.

  Raises:
    UserError: the file cannot be written, or could not be read again.
  """
  blob = to_bytes(subset, about)
  try:
    whole_files.write_bytes(path, blob)
  except OSError as e:
    raise UserError(f'cannot write the subset file {path}: {e}') from e
  return len(blob)


def load(
  path: str | os.PathLike[str],
) -> tuple[definition.Subset, dict[str, Any]]:
  """Reads a subset file.

  Args:
    path: the file, on this disk, in an object store, or on the Hugging Face
      Hub: `hf://organisation/name[@revision][/file.dst]`, see `hub.local`.

  Returns:
    The subset, and the metadata that `save` was given.

  Raises:
    UserError: there is no such file, or it is no complete, undamaged subset
      file of this version.
  """
  file = hub.local(path) if hub.is_path(path) else path
  try:
    with whole_files.open_to_read(file) as f:
      start = f.read(_LENGTH_BYTES)
      start += f.read(_header_bytes(start))
      # Refuses another file, such as a whole model, before reading all of it.
      _read_about(start)
      return from_bytes(start + f.read())
  except OSError as e:
    raise UserError(f'cannot read the subset file {path}: {e}') from e
  except UserError as e:
    raise UserError(f'{path}: {str(e).removeprefix("subset: ")}') from e
