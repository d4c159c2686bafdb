"""The identity of a model: a hash of all its parameters."""

from collections.abc import Iterable, Iterator
from concurrent import futures
import hashlib
import os
from typing import Any

import numpy as np

from dst_t5x.core import tree_paths

PyTree = Any


def tensors(params: PyTree) -> Iterator[tuple[str, np.ndarray]]:
  """Yields unstacked path and tensor, on the host, in the order of the tree.

  Args:
    params: tree of NumPy or fully addressable JAX arrays, stacked or not.
  """
  import jax  # PyTorch's reader has tensors of its own.

  for key_path, leaf in jax.tree_util.tree_leaves_with_path(params):
    path, array = tree_paths.path_of(key_path), np.asarray(leaf)
    stacked, paths = tree_paths.slice_paths(path, array.shape)
    yield from zip(paths, array if stacked else [array], strict=True)


def fingerprint(params: PyTree) -> str:
  """Returns the SHA-256 of all parameters, 64 hexadecimal digits.

  The hashed text is UTF-8 and has one line for each tensor, in ascending order
  of the paths by code point (`layers_10` comes before `layers_2`). Each line
  ends with a newline:

      <path> <dtype> <shape> <hash>

  path: the keys of the unstacked tree joined by `/`, for example
    `layers_0/attention/query/kernel`.
  dtype: NumPy's name, for example `float32`.
  shape: the sizes in decimal joined by `,`; empty for a scalar.
  hash: SHA-256 of the elements' bytes in C order, each element little-endian,
    64 lower-case hexadecimal digits.

  Equal fingerprints mean equal bits: -0.0 and 0.0 differ. A stacked tree has
  the fingerprint of its unstacked form.

  Args:
    params: nested dict of NumPy or fully addressable JAX arrays of any shape.
  """
  in_order = sorted(tensors(params), key=lambda tensor: tensor[0])
  with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    return of_lines(pool.map(lambda tensor: _line(*tensor), in_order))


def of_lines(lines: Iterable[str]) -> str:
  """Returns the fingerprint whose text has these lines, in their order."""
  return hashlib.sha256(''.join(lines).encode()).hexdigest()


def line(path: str, dtype: str, shape: tuple[int, ...], digest: str) -> str:
  """Returns the line of a tensor; see `fingerprint`."""
  return f'{path} {dtype} {",".join(map(str, shape))} {digest}\n'


def _line(path: str, array: np.ndarray) -> str:
  """Returns the line of an array."""
  little_endian = array.astype(array.dtype.newbyteorder('<'), copy=False)
  # bfloat16 arrays have no buffer, so they are viewed as bytes.
  content = np.ascontiguousarray(little_endian).reshape(-1).view(np.uint8)
  digest = hashlib.sha256(content.data).hexdigest()
  return line(path, array.dtype.newbyteorder('=').name, array.shape, digest)
