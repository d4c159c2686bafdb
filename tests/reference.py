"""The method in plain NumPy, with sorting, to compare the real one with.

Written from the paper's Section 2 and Appendix A alone: it shares nothing with
the package. Trees are nested dicts of NumPy arrays in the unstacked form, and
everything is done one component at a time.
"""

from fractions import Fraction
import math
import re

import numpy as np

_SMALLEST = np.finfo(np.float32).tiny


def flatten(tree, prefix=''):
  """Returns path -> tensor, layer 2 before layer 10."""
  flat = {}
  for key, value in tree.items():
    path = f'{prefix}{key}'
    flat |= (
      flatten(value, f'{path}/') if isinstance(value, dict) else {path: value}
    )
  return dict(sorted(flat.items(), key=lambda item: _order(item[0])))


def _order(path):
  return [int(p) if p.isdigit() else p for p in re.split(r'(\d+)', path)]


def silo_of(path):
  """Each module in each layer is a silo, and each module outside of layers."""
  match = re.match(r'((?:.*/)?layers_\d+/[^/]+)(?:/.*)?$', path)
  return match[1] if match else path.rpartition('/')[0] or path


def silos(tree):
  """Returns silo -> [(path, size)], in the order of positions."""
  result = {}
  for path, tensor in flatten(tree).items():
    size = math.prod(tensor.shape)
    result.setdefault(silo_of(path), []).append((path, size))
  return dict(sorted(result.items(), key=lambda item: _order(item[0])))


def budgets(sizes, epsilon):
  """Largest remainder: floors, then one more for the largest remainders."""
  share = Fraction(str(epsilon))
  floors = [math.floor(share * size) for size in sizes]
  remainders = [share * size - math.floor(share * size) for size in sizes]
  left = round(share * sum(sizes)) - sum(floors)
  while left:
    i = remainders.index(max(remainders))
    floors[i] += 1
    remainders[i] = Fraction(-1)
    left -= 1
  return floors


def _flush(x):
  """Accelerators and XLA on the CPU take denormal numbers for zero."""
  x = np.asarray(x, np.float32)
  return np.where(np.abs(x) < _SMALLEST, np.float32(0), x)


def distance(name, new, seed):
  """Table 1, as float32 of the shape of `new`."""
  new, seed = _flush(new), _flush(seed)
  with np.errstate(all='ignore'):
    moved = np.abs(_flush(new - seed))
    if name == 'absolute':
      return moved
    if name == 'inverse_relative':
      return _flush(moved * np.abs(seed))
    assert name == 'relative'
    return np.where(moved == 0, np.float32(0), _flush(moved / np.abs(seed)))


def select(distances, budget):
  """Returns bool [n]: the largest that are not zero, the earlier of equals."""
  # Sorting is stable; of what is negated so, NaN is the first.
  order = np.argsort(~bits(distances), kind='stable')
  kept = np.zeros(len(distances), bool)
  kept[order[:budget]] = True
  return kept & (distances != 0)


def bits(array):
  """Returns the array's bits as unsigned integers."""
  array = np.ascontiguousarray(array)
  return array.view(f'u{array.dtype.itemsize}')


def project(new, seed, epsilon, name='inverse_relative'):
  """One step of Algorithm 1; returns path -> tensor."""
  flat_new, flat_seed = flatten(new), flatten(seed)
  partition = silos(seed)
  sizes = [sum(size for _, size in parts) for parts in partition.values()]
  result = {}
  for parts, budget in zip(
    partition.values(), budgets(sizes, epsilon), strict=True
  ):
    a, b = (
      np.concatenate([flat[path].reshape(-1) for path, _ in parts])
      for flat in (flat_new, flat_seed)
    )
    chosen = np.where(select(distance(name, a, b), budget), a, b)
    start = 0
    for path, size in parts:
      part = chosen[start : start + size]
      result[path] = part.reshape(flat_seed[path].shape)
      start += size
  return result
