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


def silo_of(path, kind='per_module_and_layer'):
  """The silo of a tensor, in each siloing of Appendix A."""
  if kind == 'none':
    return 'model'
  if kind == 'per_tensor':
    return path
  if kind == 'per_module':
    return re.sub(r'(^|/)layers_\d+/', r'\1', silo_of(path))
  assert kind == 'per_module_and_layer'
  match = re.match(r'((?:.*/)?layers_\d+/[^/]+)(?:/.*)?$', path)
  return match[1] if match else path.rpartition('/')[0] or path


def silos(tree, kind='per_module_and_layer', exclude='(?!)'):
  """Returns silo -> [(path, size)], in the order of positions."""
  result = {}
  for path, tensor in flatten(tree).items():
    size = math.prod(tensor.shape)
    if not re.fullmatch(exclude, path):
      result.setdefault(silo_of(path, kind), []).append((path, size))
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


def scales(seed, name, over):
  """Returns path -> what distances are divided by (Appendix B)."""
  result = {}
  flat = flatten(seed)
  for parts in silos(seed, over).values():
    value = np.float32(sum(size for _, size in parts))
    if name == 'mean':
      total = sum(float(np.abs(flat[path]).sum(dtype=np.float64))
                  for path, _ in parts)  # fmt: skip
      value = np.float32(total / float(value)) or np.float32(1)
    result |= dict.fromkeys([path for path, _ in parts], value)
  return result


def project(
  new,
  seed,
  epsilon,
  name='inverse_relative',
  kind='per_module_and_layer',
  exclude='(?!)',
  scale=None,
):
  """One step of Algorithm 1; returns path -> tensor."""
  flat_new, flat_seed = flatten(new), flatten(seed)
  partition = silos(seed, kind, exclude)
  sizes = [sum(size for _, size in parts) for parts in partition.values()]
  # What is excluded is in no silo.
  result = {path: np.copy(tensor) for path, tensor in flat_seed.items()}
  for parts, budget in zip(
    partition.values(), budgets(sizes, epsilon), strict=True
  ):
    a, b = (
      np.concatenate([flat[path].reshape(-1) for path, _ in parts])
      for flat in (flat_new, flat_seed)
    )
    distances = distance(name, a, b)
    if scale is not None:
      divisors = [np.full(size, scale[path]) for path, size in parts]
      distances = _flush(distances / np.concatenate(divisors))
    chosen = np.where(select(distances, budget), a, b)
    start = 0
    for path, size in parts:
      part = chosen[start : start + size]
      result[path] = part.reshape(flat_seed[path].shape)
      start += size
  return result
