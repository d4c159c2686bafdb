"""Lets Orbax keep checkpoints on s3://, as it does on gs://.

TensorStore reads and writes S3, and Orbax counts it among the remote stores,
but builds specs for gs:// only (`tensorstore_utils._use_gcs_driver`; of others
it says "Checkpoint path should be absolute"), and elsewhere commits by renaming
a folder, which S3 cannot. Where a run is on S3, these few functions of Orbax
0.12 take s3:// as gs://: arrays go to TensorStore's driver for S3, and a
checkpoint counts once its file `commit_success.txt` is there.
"""

import functools
import os

from orbax.checkpoint._src.path import gcs_utils
from orbax.checkpoint._src.serialization import tensorstore_utils

from dst_t5x.core import errors
from dst_t5x.core import object_stores

_STORES = ('gs://', 's3://')


def _is_store(path: str) -> bool:
  return path.startswith(_STORES)


def _normalized(path: str) -> str:
  if not _is_store(path):
    return os.path.normpath(path)
  scheme, _, inside = path.partition('://')
  return f'{scheme}://{os.path.normpath(inside)}'


# (module, name) -> what stands there instead.
_INSTEAD = {
  (gcs_utils, '_GCS_PATH_PREFIX'): _STORES,
  (gcs_utils, 'get_kvstore_for_gcs'): object_stores.key_value_store,
  (tensorstore_utils, '_use_gcs_driver'): _is_store,
  (tensorstore_utils, '_normalize_path'): _normalized,
}


@functools.cache
def enable() -> None:
  """Makes Orbax take s3:// for the rest of this process.

  Raises:
    UserError: this version of Orbax is another inside.
  """
  for module, name in _INSTEAD:
    if not hasattr(module, name):
      raise errors.UserError(
        'this version of Orbax does not keep checkpoints on s3://: install'
        ' orbax-checkpoint 0.12.8, or mount the bucket as a folder'
      )
  for (module, name), value in _INSTEAD.items():
    setattr(module, name, value)
