"""Subsets compared and combined, against sets of plain Python."""

import dataclasses

import hypothesis
from hypothesis import strategies as st
import jax
import numpy as np
import pytest
import reference

from dst_t5x import subsets as subset
from dst_t5x.core import errors
from dst_t5x.subsets import definition

_SEED = {
  'encoder': {
    f'layers_{i}': {'mlp': {'wi': np.zeros(30, np.float32)}} for i in range(2)
  },
  'logits': {'kernel': np.zeros((5, 8), np.float32)},
}
_SIZES = {path: x.size for path, x in reference.flatten(_SEED).items()}


def _subset(entries):
  """Returns the subset of (path, position) -> value."""
  params = jax.tree.map(np.copy, _SEED)
  flat = reference.flatten(params)
  for (path, position), value in entries.items():
    flat[path].reshape(-1)[position] = value
  return subset.extract(params, _SEED)


def _entries(found):
  return {
    (path, int(p)): float(v)
    for path in found.positions
    for p, v in zip(found.positions[path], found.values[path], strict=True)
  }


_SUBSETS = st.dictionaries(
  st.sampled_from([(p, i) for p, size in _SIZES.items() for i in range(size)]),
  st.integers(1, 5),
  max_size=60,
)


@hypothesis.settings(deadline=None)
@hypothesis.given(_SUBSETS, _SUBSETS)
def test_overlap_is_that_of_sets(a, b):
  first, second = _subset(a), _subset(b)
  found = subset.overlap(first, second)
  shared = len(a.keys() & b.keys())
  assert (found.first, found.second, found.shared) == (len(a), len(b), shared)
  if a:
    assert found.share == shared / len(a)
    assert found.jaccard == shared / len(a.keys() | b.keys())
  else:
    assert np.isnan(found.share)
  modules = subset.overlap_by_module(first, second)
  assert list(modules) == ['encoder/mlp', 'logits']
  in_logits = [key for key in a.keys() & b.keys() if key[0] == 'logits/kernel']
  assert modules['logits'].shared == len(in_logits)


@hypothesis.settings(deadline=None)
@hypothesis.given(st.lists(_SUBSETS, min_size=1, max_size=3))
def test_combinations_are_those_of_dictionaries(several):
  subsets = [_subset(entries) for entries in several]
  every = {key: [e[key] for e in several if key in e] for e in several
           for key in e}  # fmt: skip
  expected = {key: values[0] for key, values in every.items()}
  assert _entries(subset.combine(subsets, 'priority').subset) == expected
  combination = subset.combine(subsets, 'mean')
  found = _entries(combination.subset)
  assert found == {
    key: float(np.float32(sum(values) / len(values)))
    for key, values in every.items()
  }
  for (i, j), overlap in combination.overlaps.items():
    assert overlap.shared == len(several[i].keys() & several[j].keys())
  assert len(combination.overlaps) == len(several) * (len(several) - 1) // 2
  conflicts = {key for key, values in every.items() if len(set(values)) > 1}
  if conflicts:
    with pytest.raises(errors.UserError, match='different values in several'):
      subset.combine(subsets)
  else:
    assert _entries(subset.combine(subsets).subset) == expected


@hypothesis.settings(deadline=None)
@hypothesis.given(_SUBSETS, _SUBSETS)
def test_differences_are_those_of_dictionaries(a, b):
  removed, added, changed = subset.diff(_subset(a), _subset(b))
  assert _entries(removed) == {k: v for k, v in a.items() if k not in b}
  assert _entries(added) == {k: v for k, v in b.items() if k not in a}
  both = a.keys() & b.keys()
  assert _entries(changed) == {k: b[k] for k in both if a[k] != b[k]}


def test_a_combination_can_be_applied():
  logits = 'logits/kernel'
  first = _subset({(logits, 1): 2.0, (logits, 3): 1.0})
  second = _subset({(logits, 0): -1.0, (logits, 3): 2.0})
  combined = subset.combine([first, second], 'mean').subset
  params = subset.apply(combined, _SEED)
  assert params['logits']['kernel'][0, :4].tolist() == [-1, 2, 0, 1.5]
  assert combined.values[logits].dtype == np.float32


def test_a_value_that_only_one_has_keeps_its_bits():
  only = _subset({('logits/kernel', 1): -0.0})
  other = _subset({('logits/kernel', 2): 1})
  combined = subset.combine([only, other], 'mean').subset
  assert np.signbit(combined.values['logits/kernel'][0])


def test_what_cannot_be_combined():
  one = _subset({('logits/kernel', 1): 1})
  known = dataclasses.replace(one, fingerprint='a' * 64)
  other = dataclasses.replace(one, fingerprint='b' * 64)
  assert subset.combine([one, other]).subset.fingerprint == 'b' * 64
  for subsets, rule, message in (
    ([], 'mean', 'nothing to combine'),
    ([one], 'meen', "no rule 'meen'; did you mean 'mean'"),
    ([known, other], 'mean', 'different seeds'),
  ):
    with pytest.raises(errors.UserError, match=message):
      subset.combine(subsets, rule)
  types = one.tensors | {
    'logits/kernel': definition.TensorType((40,), 'float32')
  }
  with pytest.raises(
    errors.UserError, match=r'logits/kernel is float32\[5, 8\]'
  ):
    subset.overlap(one, dataclasses.replace(one, tensors=types))
