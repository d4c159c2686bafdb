"""Dynamic Subset Tuning in the T5X manner."""

import os

from dst_t5x import data_folders  # noqa: F401

# Before etils asks: TensorFlow knows no s3://, see `object_stores`.
os.environ.setdefault('EPATH_USE_TF', 'false')

__version__ = '0.1.0'
