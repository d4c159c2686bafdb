"""Subsets: extract, save, load, apply, compare and combine them.

    from dst_t5x import subsets
    from dst_t5x.subsets import fingerprint

    tuned = subsets.extract(params, seed, fingerprint.fingerprint(seed))
    subsets.save('gsm8k.dst', tuned, {'epsilon': 1e-4})
    tuned, about = subsets.load('gsm8k.dst')
    params = subsets.apply(tuned, seed)

A `Layout` changes parameters on the devices; see `on_device`.
This package needs only JAX, NumPy and safetensors. The command is
`python -m dst_t5x.subset --help`.
"""

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
