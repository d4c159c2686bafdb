"""Dynamic Subset Tuning in the T5X manner."""

import os

from dst_t5x.core import data_folders  # noqa: F401
from dst_t5x.core import printed

# Before etils asks: TensorFlow knows no s3://, see `object_stores`.
os.environ.setdefault('EPATH_USE_TF', 'false')

__version__ = '0.1.0'

# Here, as every command comes by. Whoever imports the package for another
# program keeps that program's streams as they are.
if printed.is_command():
  printed.everywhere()
