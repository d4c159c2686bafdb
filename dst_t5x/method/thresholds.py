"""Exact thresholds without sorting: a search by counting.

For each silo, the search finds a threshold t such that exactly `budget`
distances are at or above t. A distance is compared as the bit pattern of a
non-negative float32, a uint32 that sorts like the float. Bounds are therefore
integers, and the search always ends. Infinities and NaNs sort above every
number. Distance zero means "did not move" and is never counted.

The search reads distances only through `count`, which returns how many of them
reach each of a few candidates. It searches all silos at once. This replaces the
paper's Algorithm 2 (App. C), which needs a ramp-up of some 20 steps and ends
near the budget, not at it.

A silo can have more than 2³² components, so counts are uint64. JAX has uint64
only within `jax.enable_x64`; no uint64 leaves a step.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

# How many candidates one pass over the parameters counts. More do not fit into
# a CPU's registers; fewer need more passes.
CANDIDATES = 6
# A threshold above every distance, for a silo without free components.
NOTHING = np.uint32(0xFFFFFFFF)
_INFINITY = 0x7F800000  # The bit pattern of float32's infinity.


class Query(NamedTuple):
  """What one pass over the parameters has to count.

  Attributes:
    candidates: uint64 [silos, CANDIDATES].
    tie: uint32 [silos]. If zero, count the distances that reach each candidate.
      Otherwise look only at the distances equal to `tie`, and count those whose
      rank reaches each candidate. The rank is the silo's size minus the
      position in it, so that earlier components rank higher.
    active: bool [silos], which silos are still searched.
  """

  candidates: jax.Array
  tie: jax.Array
  active: jax.Array


# Query -> counts, uint64 [silos, CANDIDATES]; rows of inactive silos may hold
# anything.
Count = Callable[[Query], jax.Array]


class Search(NamedTuple):
  """The state of the search; every array is [silos].

  The threshold lies in the bracket [low, high): more than `wanted` distances
  reach `low`, fewer reach `high`. When the bracket closes on one distance that
  too many components share, the search continues among these by position.
  """

  size: jax.Array  # How many components the silo has.
  wanted: jax.Array  # How many to keep; in a tie, how many of the tied ones.
  low: jax.Array
  high: jax.Array
  count_low: jax.Array
  count_high: jax.Array
  tie: jax.Array  # The distance that too many components share, or 0.
  threshold: jax.Array  # The result, once the silo is found.
  found: jax.Array
  uniform: jax.Array  # Whether to spread the next candidates evenly.


class Cut(NamedTuple):
  """What a silo keeps: distances above a threshold, and some that equal it.

  Attributes:
    threshold: uint32 [silos], bit patterns of distances.
    before: uint64 [silos], a position in the silo. Components whose distance
      equals the threshold are kept if they come before it.
  """

  threshold: jax.Array
  before: jax.Array


def _start(budgets: jax.Array, sizes: jax.Array) -> Search:
  zeros = jnp.zeros_like(sizes)
  nothing = budgets == 0
  return Search(
    size=sizes,
    wanted=jnp.maximum(budgets, 1),  # The 1 keeps logarithms finite.
    low=zeros,
    high=jnp.full_like(sizes, NOTHING),
    count_low=sizes,
    count_high=zeros,
    tie=zeros.astype(jnp.uint32),
    # If the budget covers the silo, every component that moved is free.
    threshold=jnp.where(nothing, jnp.uint64(NOTHING), jnp.uint64(1)),
    found=nothing | (budgets >= sizes),
    uniform=jnp.zeros(sizes.shape, bool),
  )


def _narrow(search: Search, candidates: jax.Array, counts: jax.Array) -> Search:
  """Returns the search with its bracket narrowed by the counts of one pass."""
  wanted = search.wanted[:, None]
  low, high = search.low[:, None], search.high[:, None]
  inside = (candidates > low) & (candidates < high)
  hit = inside & (counts == wanted)
  above = inside & (counts > wanted)
  below = inside & (counts < wanted)
  # Counts fall as candidates rise, so the new bounds have the extreme counts.
  narrowed = search._replace(
    low=jnp.max(jnp.where(above, candidates, low), axis=1),
    high=jnp.min(jnp.where(below, candidates, high), axis=1),
    count_low=jnp.min(
      jnp.where(above, counts, search.count_low[:, None]), axis=1
    ),
    count_high=jnp.max(
      jnp.where(below, counts, search.count_high[:, None]), axis=1
    ),
  )
  exact = jnp.any(hit, axis=1)
  closed = narrowed.high - narrowed.low <= 1
  # Closed on zero: fewer components moved than are wanted, so all are kept.
  all_fit = closed & (narrowed.low == 0)
  hit_at = jnp.min(jnp.where(hit, candidates, high), axis=1)
  narrowed = narrowed._replace(
    threshold=jnp.where(exact, hit_at, narrowed.high),
    found=exact | all_fit,
    # Interpolation does not help where distances have gaps between them.
    uniform=(narrowed.high - narrowed.low > (search.high - search.low) // 4)
    | (
      (narrowed.count_low == search.count_low)
      & (narrowed.count_high == search.count_high)
    ),
  )
  narrowed = _break_ties(narrowed, closed & ~exact & ~all_fit)
  return _where(search.found, search, narrowed)


def _break_ties(search: Search, closed: jax.Array) -> Search:
  """Starts the search by position where the bracket closed on one distance."""
  by_position = search._replace(
    wanted=search.wanted - search.count_high,
    low=jnp.ones_like(search.low),
    high=search.size + 1,
    count_low=search.count_low - search.count_high,
    count_high=jnp.zeros_like(search.count_high),
    tie=search.low.astype(jnp.uint32),
    uniform=jnp.zeros_like(search.uniform),
  )
  return _where(closed, by_position, search)


def _where(condition: jax.Array, a: Search, b: Search) -> Search:
  return jax.tree.map(lambda x, y: jnp.where(condition, x, y), a, b)


# Offsets of the first candidates, in units of the guess's expected error. The
# outermost are far away, because a missed threshold costs three passes.
_FIRST = (-6.0, -1.3, -0.3, 0.3, 1.3, 6.0)
# Offsets of later candidates, in units of the interpolation's expected error.
_NEXT = (-2.6, -0.9, -0.25, 0.25, 0.9, 2.6)
# Least offsets of later candidates, in units of the bracket's width. They are
# larger below: small distances are more frequent, so most thresholds lie below
# the interpolated value.
_LEAST = (-0.35, -0.12, 0.0, 0.0, 0.0, 0.03)


def _place(search: Search) -> jax.Array:
  """Returns the next candidates, uint64 [silos, CANDIDATES], in the bracket.

  Candidates surround an interpolation between the two sides of the bracket: of
  log-counts, or of counts in a search by position. The expected error is that
  of an order statistic between two known ones. Where the last pass shrank the
  bracket too little, candidates are spread evenly instead. The bracket thus
  shrinks at least fourfold in every other pass.
  """
  wanted = search.wanted.astype(jnp.float32)
  width = (search.high - search.low).astype(jnp.float32)
  surplus = (search.count_low - search.wanted).astype(jnp.float32)
  deficit = (search.wanted - search.count_high).astype(jnp.float32)
  count_high = jnp.maximum(search.count_high.astype(jnp.float32), 0.5)
  log_low = jnp.log1p(surplus / wanted)
  log_high = jnp.log(wanted / count_high)
  inside = jnp.maximum(surplus + deficit, 1.0)
  fraction = jnp.where(
    search.tie > 0,
    surplus / inside,
    log_low / jnp.maximum(log_low + log_high, 1e-20),
  )
  error = jnp.sqrt(jnp.maximum(surplus * deficit, 0.0) / inside) / inside
  off = error[:, None] * jnp.asarray(_NEXT, jnp.float32)
  least = jnp.asarray(_LEAST, jnp.float32)
  off = jnp.where(off < 0, jnp.minimum(off, least), jnp.maximum(off, least))
  guided = jnp.clip(fraction[:, None] + off, 0.0, 1.0)
  even = (jnp.arange(CANDIDATES, dtype=jnp.float32) + 1) / (CANDIDATES + 1)
  share = jnp.where(search.uniform[:, None], even, guided)
  steps = (share * width[:, None]).astype(jnp.uint64)
  last = jnp.maximum(search.high - search.low, 2)[:, None] - 1
  candidates = search.low[:, None] + jnp.clip(steps, 1, last)
  # While the lower bound is 0, one candidate tests whether enough moved.
  ask_one = (search.low == 0)[:, None] & (jnp.arange(CANDIDATES) == 0)
  return jnp.where(ask_one, jnp.uint64(1), candidates)


def _first(search: Search, guess: jax.Array, spread: jax.Array) -> jax.Array:
  """Returns the candidates of the first pass, around the guess if known."""
  offsets = spread[:, None] * jnp.asarray(_FIRST, jnp.float32)
  around = guess.astype(jnp.int32)[:, None] + offsets.astype(jnp.int32)
  warm = jnp.clip(around, 1, _INFINITY).astype(jnp.uint64)
  cold = _place(search._replace(high=jnp.full_like(search.high, _INFINITY)))
  return jnp.where((guess > 0)[:, None], warm, cold)


def find(
  count: Count,
  budgets: Sequence[int] | np.ndarray | jax.Array,
  sizes: Sequence[int] | np.ndarray | jax.Array,
  guess: jax.Array,
  spread: jax.Array,
) -> tuple[Cut, jax.Array]:
  """Finds the cut of every silo.

  Args:
    count: answers a query with one pass over the parameters.
    budgets: [silos], how many components to keep; or uint32 [silos, 2], the
      upper and the lower 32 bits of each budget.
    sizes: [silos], how many components there are.
    guess: uint32 [silos], the expected threshold; 0 if unknown.
    spread: float32 [silos], the guess's expected error, in units of the last
      bit.

  Returns:
    The cut, and the number of passes, uint32 []. The cut keeps exactly the
    budgets, or every component that moved if these are fewer.
  """
  with jax.enable_x64(True):
    start = _start(_whole(budgets), jnp.asarray(sizes, jnp.uint64))
    first = _first(start, guess, spread)
    end, passes = _search(count, start, first)
    is_tied = end.tie > 0
    cut = Cut(
      threshold=jnp.where(is_tied, end.tie, end.threshold.astype(jnp.uint32)),
      # position < before, from size - position >= threshold.
      before=jnp.where(is_tied, end.size + 1 - end.threshold, end.size),
    )
  return cut, passes


def _whole(numbers: Any) -> jax.Array:
  """Returns uint64 [silos] from numbers [silos] or their halves [silos, 2]."""
  if np.ndim(numbers) == 1:
    return jnp.asarray(numbers, jnp.uint64)
  halves = jnp.asarray(numbers).astype(jnp.uint64)
  return (halves[:, 0] << 32) | halves[:, 1]


def _search(
  count: Count, start: Search, first: jax.Array
) -> tuple[Search, jax.Array]:
  """Counts until every silo is found; returns the end and the pass count."""

  def not_done(carry: tuple[Search, jax.Array, jax.Array]) -> jax.Array:
    return jnp.any(~carry[0].found)

  def one_pass(
    carry: tuple[Search, jax.Array, jax.Array],
  ) -> tuple[Search, jax.Array, jax.Array]:
    search, candidates, passes = carry
    counts = count(Query(candidates, search.tie, ~search.found))
    search = _narrow(search, candidates, counts)
    return search, _place(search), passes + 1

  end, _, passes = lax.while_loop(
    not_done, one_pass, (start, first, jnp.uint32(0))
  )
  return end, passes
