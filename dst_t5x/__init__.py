"""Dynamic Subset Tuning in the T5X manner."""

import os

from dst_t5x.core import data_folders  # noqa: F401
from dst_t5x.core import output_encoding

# etils reads this when it is imported. TensorFlow does not support s3://.
os.environ.setdefault('EPATH_USE_TF', 'false')

__version__ = '0.1.0'

# Every command imports this module. Programs that import the package as a
# library keep their streams as they are.
if output_encoding.is_command():
  output_encoding.replace_unencodable()
