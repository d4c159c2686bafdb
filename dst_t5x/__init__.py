"""Dynamic Subset Tuning in the T5X manner."""

__version__ = '0.1.0'
