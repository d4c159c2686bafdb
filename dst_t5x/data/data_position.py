"""The position of a tf.data pipeline, shuffle buffers included, as bytes.

Data that is read in several shards has one position for each shard. `pack`
joins the positions of a process, and `merge` those of all processes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import io
import os
import pathlib
import tempfile
import zipfile

from dst_t5x.runtime import quiet_tensorflow  # noqa: F401

# isort: split
import msgpack
import tensorflow as tf

from dst_t5x.core.errors import UserError, first_line, writing

# Prefix of the packed positions of several shards.
_SHARDS = b'shards '


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


def save(iterator: tf.data.Iterator) -> bytes:
  """Returns the state of a tf.data iterator as a compressed archive."""
  archive = io.BytesIO()
  with _temporary_folder() as folder:
    tf.train.Checkpoint(iterator=iterator).write(os.path.join(folder, 'it'))
    with zipfile.ZipFile(archive, 'w', zipfile.ZIP_DEFLATED) as packed:
      for path in sorted(pathlib.Path(folder).iterdir()):
        # A new ZipInfo has a fixed date, so equal states give equal bytes.
        info = zipfile.ZipInfo(path.name)
        packed.writestr(info, path.read_bytes(), zipfile.ZIP_DEFLATED)
  return archive.getvalue()


@contextlib.contextmanager
def _temporary_folder() -> Iterator[str]:
  temporary = tempfile.gettempdir()
  with (
    writing(f'the folder of temporary files, {temporary} (TMPDIR)'),
    tempfile.TemporaryDirectory() as folder,
  ):
    yield folder


def restore(iterator: tf.data.Iterator, position: bytes) -> None:
  """Sets a tf.data iterator of the same dataset to a saved state.

  Raises:
    UserError: the position is damaged or belongs to another dataset.
  """
  try:
    with _temporary_folder() as folder:
      with zipfile.ZipFile(io.BytesIO(position)) as packed:
        packed.extractall(folder)
      checkpoint = tf.train.Checkpoint(iterator=iterator)
      checkpoint.read(os.path.join(folder, 'it')).assert_consumed()
  except (zipfile.BadZipFile, tf.errors.OpError, AssertionError) as error:
    raise UserError(
      'the saved data position does not fit the task; it was saved with'
      f' another one or is damaged ({first_line(error)})'
    ) from error
