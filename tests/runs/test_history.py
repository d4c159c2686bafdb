"""The subsets of a run's checkpoints: their files and their reports."""

import analysis_runs
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

from dst_t5x import subsets as subset
from dst_t5x.runs import history
from dst_t5x.subsets import fingerprint

_ABOUT = {'epsilon': 0.01}


def _positions(found):
  return {(path, i) for path, p in found.positions.items() for i in p.tolist()}


def _subsets(count):
  return [analysis_runs.random_subset(3000, seed) for seed in range(count)]


def test_overlaps_are_with_the_first_and_with_the_last_saved(tmp_path):
  of_run = history.History(tmp_path, keep=True)
  subsets = _subsets(3)
  assert of_run.add(10, subsets[0], _ABOUT) == {}
  first, second, third = map(_positions, subsets)
  assert of_run.add(20, subsets[1], _ABOUT) == {
    'overlap/first': len(first & second) / len(first),
    'overlap/last_saved': len(first & second) / len(first),
  }
  assert of_run.add(30, subsets[2], _ABOUT) == {
    'overlap/first': len(first & third) / len(first),
    'overlap/last_saved': len(second & third) / len(second),
  }
  found = history.files(tmp_path)
  assert [step for step, _ in found] == [10, 20, 30]
  for (_, path), expected in zip(found, subsets, strict=True):
    loaded, about = subset.load(path)
    assert _positions(loaded) == _positions(expected)
    assert about['epsilon'] == 0.01


def test_a_resumed_run_says_the_same(tmp_path):
  subsets = _subsets(4)
  whole = history.History(tmp_path / 'whole', keep=True)
  expected = [whole.add(i + 1, s, _ABOUT) for i, s in enumerate(subsets)]
  cut = history.History(tmp_path / 'cut', keep=True)
  for i in range(3):
    cut.add(i + 1, subsets[i], _ABOUT)
  # Killed while checkpoint 3 was written: it goes on from the second.
  resumed = history.History(tmp_path / 'cut', keep=True)
  resumed.resume(2, subsets[1])
  assert resumed.add(3, subsets[2], _ABOUT) == expected[2]
  assert resumed.add(4, subsets[3], _ABOUT) == expected[3]
  for (_, a), (_, b) in zip(
    history.files(tmp_path / 'whole'),
    history.files(tmp_path / 'cut'),
    strict=True,
  ):
    assert a.read_bytes() == b.read_bytes()


def test_a_run_resumed_before_its_first_file_begins_anew(tmp_path):
  killed = history.History(tmp_path, keep=True)
  killed.add(10, _subsets(1)[0], _ABOUT)
  again = history.History(tmp_path, keep=True)
  assert again.add(10, _subsets(2)[1], _ABOUT) == {}


def test_without_files_only_the_last_one_is_known_after_a_resumption(tmp_path):
  one, two, three = _subsets(3)
  first = history.History(tmp_path, keep=False)
  first.add(1, one, _ABOUT)
  assert set(first.add(2, two, _ABOUT)) == {
    'overlap/first',
    'overlap/last_saved',
  }
  resumed = history.History(tmp_path, keep=False)
  resumed.resume(2, two)
  assert set(resumed.add(3, three, _ABOUT)) == {'overlap/last_saved'}
  assert not list(tmp_path.iterdir())


def test_a_damaged_first_file_stops_nothing(tmp_path):
  one, two, three = _subsets(3)
  of_run = history.History(tmp_path, keep=True)
  of_run.add(1, one, _ABOUT)
  of_run.add(2, two, _ABOUT)
  history.files(tmp_path)[0][1].write_bytes(b'no subset')
  resumed = history.History(tmp_path, keep=True)
  resumed.resume(2, two)
  assert set(resumed.add(3, three, _ABOUT)) == {'overlap/last_saved'}


@pytest.mark.parametrize(
  ('distance', 'expected'),
  [
    ('absolute', [1.0, 3.0]),
    ('relative', [0.5, 0.75]),
    ('inverse_relative', [2.0, 12.0]),
    ('random', [1.0, 3.0]),
  ],
)
def test_distances_are_those_of_what_is_free(distance, expected):
  seed = {'mlp': {'kernel': np.float32([[2.0, 5.0], [4.0, 0.0]])}}
  tuned = {'mlp': {'kernel': jnp.float32([[3.0, 5.0], [1.0, 0.0]])}}
  found = subset.extract(tuned, seed, fingerprint.fingerprint(seed))
  moved = history.distances_from_seed(found, seed, distance)
  np.testing.assert_allclose(moved, expected)


def test_nothing_free_has_no_distances():
  seed = {'mlp': {'kernel': np.ones((2, 2), np.float32)}}
  found = subset.extract(seed, seed, fingerprint.fingerprint(seed))
  moved = history.distances_from_seed(found, seed, 'relative')
  assert moved.shape == (0,)
  assert history.histogram(moved).shape == (0, 3)


@settings(deadline=None, max_examples=60)
@given(
  st.lists(
    st.floats(0, allow_infinity=True, allow_nan=False, width=32), max_size=50
  )
)
def test_every_distance_is_in_one_bin(values):
  values = np.array(values, np.float32)
  bins = history.histogram(values)
  kept = values[(values > 0) & np.isfinite(values)].astype(np.float64)
  assert bins[:, 2].sum() == len(kept)
  for lower, upper, count in bins:
    logs = np.log10(kept)
    assert count == np.sum((logs >= lower) & (logs < upper))
  np.testing.assert_array_equal(bins[1:, 0], bins[:-1, 1])
