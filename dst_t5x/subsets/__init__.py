"""Subsets: extract, save, load, apply, compare and combine them.

    from dst_t5x import subsets
    from dst_t5x.subsets import fingerprint

    tuned = subsets.extract(params, seed, fingerprint.fingerprint(seed))
    subsets.save('gsm8k.dst', tuned, {'epsilon': 1e-4})
    tuned, about = subsets.load('gsm8k.dst')
    params = subsets.apply(tuned, seed)

A `Layout` changes parameters on the devices; see `on_device`.
This package needs only JAX, NumPy and safetensors; `torch` in it needs PyTorch
in JAX's place, so nothing here is imported before it is used. The command is
`python -m dst_t5x.subset --help`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from dst_t5x.subsets.algebra import Combination
  from dst_t5x.subsets.algebra import Overlap
  from dst_t5x.subsets.algebra import combine
  from dst_t5x.subsets.algebra import overlap
  from dst_t5x.subsets.algebra import overlap_by_module
  from dst_t5x.subsets.extraction import Difference
  from dst_t5x.subsets.extraction import Subset
  from dst_t5x.subsets.extraction import apply
  from dst_t5x.subsets.extraction import diff
  from dst_t5x.subsets.extraction import extract
  from dst_t5x.subsets.file import FORMAT
  from dst_t5x.subsets.file import from_arrays
  from dst_t5x.subsets.file import from_bytes
  from dst_t5x.subsets.file import load
  from dst_t5x.subsets.file import save
  from dst_t5x.subsets.file import to_arrays
  from dst_t5x.subsets.file import to_bytes
  from dst_t5x.subsets.on_device import Layout
  from dst_t5x.subsets.on_device import Placed
  from dst_t5x.subsets.prediction import predicted_bytes
  from dst_t5x.subsets.sharded import extract_here
  from dst_t5x.subsets.sharded import merge

# Module -> what of it this package has.
_PLACES = {
  'algebra': (
    'Combination',
    'Overlap',
    'combine',
    'overlap',
    'overlap_by_module',
  ),
  'extraction': (
    'Difference',
    'Subset',
    'apply',
    'diff',
    'extract',
  ),
  'file': (
    'FORMAT',
    'from_arrays',
    'from_bytes',
    'load',
    'save',
    'to_arrays',
    'to_bytes',
  ),
  'on_device': (
    'Layout',
    'Placed',
  ),
  'prediction': ('predicted_bytes',),
  'sharded': (
    'extract_here',
    'merge',
  ),
}


def __getattr__(name: str) -> Any:
  for module, names in _PLACES.items():
    if name in names:
      found = getattr(importlib.import_module(f'{__name__}.{module}'), name)
      globals()[name] = found
      return found
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


__all__ = [
  'FORMAT',
  'Combination',
  'Difference',
  'Layout',
  'Overlap',
  'Placed',
  'Subset',
  'apply',
  'combine',
  'diff',
  'extract',
  'extract_here',
  'from_arrays',
  'from_bytes',
  'load',
  'merge',
  'overlap',
  'overlap_by_module',
  'predicted_bytes',
  'save',
  'to_arrays',
  'to_bytes',
]
