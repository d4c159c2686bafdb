"""Codes of positions: there and back, of the length that is promised."""

import math
import time

import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest

from dst_t5x.core import errors
from dst_t5x.subsets import position_codes


@st.composite
def positions_and_size(draw):
  size = draw(st.integers(1, 3000) | st.integers(1, position_codes.MOST))
  some = draw(st.sets(st.integers(0, size - 1), max_size=60))
  start = draw(st.integers(0, size - 1))
  # A cluster, too.
  some |= set(range(start, min(size, start + draw(st.integers(0, 40)))))
  return np.array(sorted(some), np.int64), size


@hypothesis.settings(deadline=None, max_examples=300)
@hypothesis.given(positions_and_size())
@hypothesis.example((np.arange(64), 64))
@hypothesis.example((np.array([position_codes.MOST - 1]), position_codes.MOST))
def test_there_and_back(example):
  positions, size = example
  quotients, remainders = position_codes.encode(positions, size)
  found = position_codes.decode(quotients, remainders, size)
  assert found.dtype == np.int64
  assert found.tolist() == positions.tolist()
  count, k = len(positions), position_codes.remainder_bits(len(positions), size)
  assert remainders.shape == (k, math.ceil(count / 8))
  assert 8 * (len(quotients) - 1) < count + size / 2**k
  if count:
    # What k promises: neither one more nor one less is better at random.
    assert 27 * count * 2**k >= 13 * size
    assert not k or 27 * count * 2 ** (k - 1) < 13 * size


def test_the_empty_list():
  quotients, remainders = position_codes.encode(np.zeros(0, np.int64), 9)
  assert (quotients.shape, remainders.shape) == ((0,), (0, 0))
  assert position_codes.decode(quotients, remainders, 9).tolist() == []
  assert position_codes.expected_bytes(0, 9) == 0


def test_golden():
  # Gaps 1, 0, 6, 9 of 4 in 27, so k = 2: quotients 0, 0, 1, 2 and remainders
  # 1, 0, 2, 1.
  quotients, remainders = position_codes.encode(np.int64([1, 2, 9, 19]), 27)
  assert quotients.tolist() == [0b1001011]
  assert remainders.tolist() == [[0b1001], [0b0100]]


@pytest.mark.parametrize(
  ('epsilon', 'most', 'entropy'),
  [(1e-3, 1.5, 1.426), (1e-2, 1.5, 1.010), (1e-1, 1.5, 0.587)],
)
def test_bytes_a_position_at_random(epsilon, most, entropy):
  size = 3_000_000
  random = np.random.default_rng(0)
  positions = np.flatnonzero(random.random(size) < epsilon)
  codes = position_codes.encode(positions, size)
  found = sum(code.nbytes for code in codes) / len(positions)
  assert found <= most
  assert entropy * 0.98 < found < entropy * 1.04
  expected = position_codes.expected_bytes(len(positions), size)
  assert found == pytest.approx(expected / len(positions), rel=0.01)


def test_two_millions_take_under_a_second():
  positions = np.flatnonzero(np.random.default_rng(0).random(20_000_000) < 0.1)
  start = time.process_time()
  codes = position_codes.encode(positions, 20_000_000)
  found = position_codes.decode(*codes, 20_000_000)
  assert time.process_time() - start < 1
  assert np.array_equal(found, positions)


@pytest.mark.parametrize('positions', [[3, 3], [4, 3], [-1, 3], [3, 9]])
def test_what_has_no_code(positions):
  with pytest.raises(errors.UserError, match='not ascending, or out of range'):
    position_codes.encode(np.int64(positions), 9)


def test_what_is_no_code():
  quotients, remainders = position_codes.encode(np.int64([1, 2, 9, 19]), 27)
  bad = [
    (quotients[:0], remainders),
    (np.append(quotients, np.uint8(0)), remainders),
    (quotients & 0b111111, remainders),
    (quotients, remainders[:1]),
    (quotients, remainders[0]),
    (quotients, np.repeat(remainders, 2, axis=1)),
    (quotients, remainders | 0b10000),
    (np.uint8([0, 0b1001011]), remainders),
    (np.uint8([0b1001011 << 1]), remainders | 0b1111),
  ]
  for codes in bad:
    with pytest.raises(errors.UserError, match=r'^subset: (a|its) position'):
      position_codes.decode(*codes, 27)
  # Nothing is shifted out of 64 bits.
  far = np.zeros(4096, np.uint8)
  far[-1] = 128
  size = position_codes.MOST
  with pytest.raises(errors.UserError, match='out of range'):
    position_codes.decode(
      far, np.zeros((position_codes.remainder_bits(1, size), 1), np.uint8), size
    )
