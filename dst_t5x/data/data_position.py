"""Positions in the training data, as bytes.

A position is the state of a tf.data pipeline (see `pipeline_state`) or a number
of batches. Data that is read in several shards has one position for each shard.
`pack` joins the positions of a process, and `merge` those of all processes.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import msgpack

from dst_t5x.core.errors import UserError

# Prefix of the packed positions of several shards.
_SHARDS = b'shards '
# Prefix of a position that is a number of batches.
_COUNT = b'batches '


class TrainItem(NamedTuple):
  """One training batch.

  Attributes:
    step: the training step that uses the batch; the first is 1.
    batch: model features, `[batch, length]` each, as returned by `place`.
    position: the position after this batch; None if not requested.
  """

  step: int
  batch: Any
  position: bytes | None


def counted(batches: int) -> bytes:
  """Returns the position after a number of batches."""
  return _COUNT + str(batches).encode()


def count_of(position: bytes) -> int | None:
  """Returns the number of batches; None if the position is a state."""
  if not position.startswith(_COUNT):
    return None
  return int(position.removeprefix(_COUNT))


def pack(positions: Mapping[int, bytes]) -> bytes:
  """Returns the positions of several shards as one position."""
  return _SHARDS + msgpack.packb(dict(positions))


def unpack(position: bytes, shards: Sequence[int]) -> dict[int, bytes]:
  """Returns shard -> position, for the given shards.

  Raises:
    UserError: the position has other shards or is damaged.
  """
  try:
    positions = _unpack(position)
    return {shard: positions[shard] for shard in shards}
  except (KeyError, ValueError) as error:
    raise UserError(
      'the saved data position does not fit DATA_SHARDS, or is damaged'
    ) from error


def _unpack(position: bytes) -> dict[int, bytes]:
  content = position.removeprefix(_SHARDS)
  return dict(msgpack.unpackb(content, strict_map_key=False))


def merge(position: bytes, gather: Callable[[bytes], list[bytes]]) -> bytes:
  """Returns the position of the data of all processes.

  Args:
    position: the position of this process.
    gather: returns the bytes of each process.
  """
  if not position.startswith(_SHARDS):
    return position  # All processes read the same.
  return pack(
    {
      shard: part
      for packed in gather(position)
      for shard, part in _unpack(packed).items()
    }
  )
