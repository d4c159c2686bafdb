"""Makes Orbax store checkpoints on s3:// as it does on gs://.

TensorStore supports S3, but Orbax 0.12 builds TensorStore specs for gs:// only
(`tensorstore_utils._use_gcs_driver`; other stores fail with "Checkpoint path
should be absolute"). Outside of gs://, it commits a checkpoint by renaming its
folder, which S3 cannot do.

`enable` replaces a few functions of Orbax so that they treat s3:// like gs://.
Arrays then go to TensorStore's S3 driver, and the file `commit_success.txt`
commits a checkpoint.
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


# (module, name) -> replacement.
_INSTEAD = {
  (gcs_utils, '_GCS_PATH_PREFIX'): _STORES,
  (gcs_utils, 'get_kvstore_for_gcs'): object_stores.key_value_store,
  (tensorstore_utils, '_use_gcs_driver'): _is_store,
  (tensorstore_utils, '_normalize_path'): _normalized,
}


@functools.cache
def enable() -> None:
  """Makes Orbax accept s3:// for the rest of this process.

  Raises:
    UserError: this version of Orbax lacks a function to replace.
  """
  for module, name in _INSTEAD:
    if not hasattr(module, name):
      raise errors.UserError(
        'this version of Orbax does not keep checkpoints on s3://: install'
        ' orbax-checkpoint 0.12.8, or mount the bucket as a folder'
      )
  for (module, name), value in _INSTEAD.items():
    setattr(module, name, value)
