"""Operations on several subsets of one seed: overlaps and combinations."""

from collections.abc import Sequence
import dataclasses
import itertools
import math
from typing import Literal, NamedTuple, get_args

import numpy as np

from dst_t5x.core.errors import UserError, nearest
from dst_t5x.method import silos
from dst_t5x.subsets import extraction

Subset = extraction.Subset
Rule = Literal['disjoint', 'priority', 'mean']


@dataclasses.dataclass(frozen=True)
class Overlap:
  """The overlap of two sets of positions, A and B.

  Attributes:
    shared: |A ∩ B|.
    first: |A|.
    second: |B|.
  """

  shared: int
  first: int
  second: int

  @property
  def share(self) -> float:
    """|A ∩ B| / |A| (Eq. 9); NaN if A is empty."""
    return self.shared / self.first if self.first else math.nan

  @property
  def jaccard(self) -> float:
    """|A ∩ B| / |A ∪ B|; NaN if both are empty."""
    union = self.first + self.second - self.shared
    return self.shared / union if union else math.nan

  def __add__(self, other: 'Overlap') -> 'Overlap':
    """Returns the overlap of two disjoint parts together."""
    return Overlap(
      self.shared + other.shared,
      self.first + other.first,
      self.second + other.second,
    )


_NONE = Overlap(0, 0, 0)


def overlap(first: Subset, second: Subset) -> Overlap:
  """Returns the overlap of two subsets' positions (Eq. 9).

  Raises:
    UserError: the subsets have different seeds.
  """
  return sum(overlap_by_module(first, second).values(), _NONE)


def overlap_by_module(first: Subset, second: Subset) -> dict[str, Overlap]:
  """Returns the overlap for each module, over all layers.

  Returns:
    Module, such as `mlp` -> overlap, for all modules of the seed.

  Raises:
    UserError: the subsets have different seeds.
  """
  extraction.check_same_seed(first, second)
  modules: dict[str, Overlap] = {}
  for path in first.tensors:
    a, b = (extraction.entries(s, path)[0] for s in (first, second))
    shared = len(np.intersect1d(a, b, assume_unique=True))
    module = silos.per_module(path)
    of_tensor = Overlap(shared, len(a), len(b))
    modules[module] = modules.get(module, _NONE) + of_tensor
  return dict(sorted(modules.items()))


class Combination(NamedTuple):
  """A combination of several subsets.

  Attributes:
    subset: a subset with the union of their positions.
    overlaps: (i, j) -> overlap of the i-th with the j-th, i < j.
  """

  subset: Subset
  overlaps: dict[tuple[int, int], Overlap]


def combine(subsets: Sequence[Subset], rule: Rule = 'disjoint') -> Combination:
  """Returns one subset with the positions of several.

  Args:
    subsets: subsets of the same seed.
    rule: the value of a position that several subsets have. 'disjoint': their
      common value; a difference in any bit is an error. 'priority': the value
      of the first of them. 'mean': the mean of their values, computed in
      float64.

  Raises:
    UserError: there are no subsets, they have different seeds, the rule is
      unknown, or the rule is 'disjoint' and values differ.
  """
  if rule not in get_args(Rule):
    raise UserError(
      f'subset: no rule {rule!r}{nearest(rule, get_args(Rule))} (known: '
      f'{", ".join(get_args(Rule))})'
    )
  if not subsets:
    raise UserError('subset: nothing to combine')
  overlaps = {
    (i, j): overlap(subsets[i], subsets[j])
    for i, j in itertools.combinations(range(len(subsets)), 2)
  }
  paths = sorted(set().union(*(s.positions for s in subsets)))
  content = {
    path: _combined(path, [extraction.entries(s, path) for s in subsets], rule)
    for path in paths
  }
  combined = extraction.like(subsets[0], content)
  known = [s.fingerprint for s in subsets if s.fingerprint is not None]
  fingerprint = known[0] if known else None
  combined = dataclasses.replace(combined, fingerprint=fingerprint)
  return Combination(combined, overlaps)


def _combined(
  path: str, entries: Sequence[tuple[np.ndarray, np.ndarray]], rule: Rule
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the positions and values of one tensor."""
  all_positions = np.concatenate([positions for positions, _ in entries])
  all_values = np.concatenate([values for _, values in entries])
  # `np.unique` returns the first of equal positions, from the first subset.
  positions, first, index = np.unique(
    all_positions, return_index=True, return_inverse=True
  )
  values = all_values[first]
  if rule == 'disjoint':
    conflicts = extraction.bits(all_values) != extraction.bits(values)[index]
    if conflicts.any():
      raise UserError(
        f'subset: {len(np.unique(index[conflicts]))} positions of {path} have '
        'different values in several subsets; choose the rule priority or mean'
      )
  if rule == 'mean':
    counts = np.bincount(index)
    sums = np.bincount(index, weights=all_values.astype(np.float64))
    # A sum loses the sign of a zero; a single value keeps it.
    values = np.where(counts > 1, (sums / counts).astype(values.dtype), values)
  return positions, values
