"""Dynamic Subset Tuning in the T5X manner."""

from dst_t5x import data_folders  # noqa: F401

__version__ = '0.1.0'
