"""The state of a tf.data pipeline, shuffle buffers included, as bytes."""

from collections.abc import Iterator
import contextlib
import io
import os
import pathlib
import tempfile
import zipfile

from dst_t5x.runtime import quiet_tensorflow  # noqa: F401

# isort: split
import tensorflow as tf

from dst_t5x.core.errors import UserError, first_line, writing


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
