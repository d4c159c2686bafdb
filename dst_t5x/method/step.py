"""One step of the subset method: from θ′ and θ⁰ to masks of free components.

A step computes distances, searches the cut of every silo (App. C), and makes
the masks (Eq. 7).
"""

from collections.abc import Callable, Sequence
import functools
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from dst_t5x.method import counting
from dst_t5x.method import distance_bits
from dst_t5x.method import iterative_thresholds
from dst_t5x.method import masks
from dst_t5x.method import reports
from dst_t5x.method import silos
from dst_t5x.method import sorted_thresholds
from dst_t5x.method import sparse_seed as sparse_seed_lib
from dst_t5x.method import thresholds

PyTree = Any


class ProjectionState(NamedTuple):
  """The state that one step passes to the next.

  Thresholds and drift only make the exact search faster; they do not change its
  result. The iterative search starts from the thresholds.

  Attributes:
    thresholds: uint32 [silos], bit patterns of distances; 0 before the first
      step.
    drift: float32 [silos], running mean of how far a threshold moves in a
      step, in units of the last bit.
    passes: uint32 [], passes over the parameters in the last step.
    scales: float32 [groups], the divisors of distances; () without
      normalization.
    chosen: without churn, a pair: the subset as `masks.pack` returns it, and
      whether it is final, bool []. () with churn.
    sparse_seed: the list that rebuilds the seed from θᵗ; () if the seed is
      kept.
  """

  thresholds: jax.Array
  drift: jax.Array
  passes: jax.Array
  scales: jax.Array | tuple[()] = ()
  chosen: Any = ()
  sparse_seed: sparse_seed_lib.SparseSeed | tuple[()] = ()


# (tree, budgets, state) -> (cuts, number of passes over the parameters).
Find = Callable[
  [distance_bits.Tree, Any, ProjectionState],
  tuple[thresholds.Cut, jax.Array],
]


class Step(NamedTuple):
  """The inputs of one step, and its search for cuts.

  Attributes:
    tree: θ′ and θ⁰, and how to compute their distances.
    structure: the tree structure of the parameters.
    budgets: uint32 [silos, 2], see `halves`.
    find: the search for the cuts.
  """

  tree: distance_bits.Tree
  structure: Any
  budgets: Any
  find: Find

  def search(
    self, state: ProjectionState
  ) -> tuple[thresholds.Cut, ProjectionState]:
    """Returns the cut of every silo, and the next state.

    The search starts from the last step's thresholds.
    """
    cut, passes = self.find(self.tree, self.budgets, state)
    now = cut.threshold.astype(jnp.float32)
    moved = jnp.abs(now - state.thresholds.astype(jnp.float32))
    drift = jnp.where(
      # There is no earlier threshold. 2²⁰ bit patterns are about 9 % of its
      # value.
      state.thresholds == 0,
      2.0**20,
      0.7 * state.drift + 0.3 * moved,
    )
    searched = jnp.any(jnp.asarray(self.budgets) > 0, axis=1)
    return cut, state._replace(
      thresholds=jnp.where(searched, cut.threshold, 0),
      drift=drift,
      passes=passes,
    )

  def kept(self, cut: thresholds.Cut) -> PyTree:
    """Returns the tree of bool masks of the components that stay free."""
    return jax.tree.unflatten(
      self.structure, distance_bits.kept(self.tree, cut)
    )

  def kept_without_churn(
    self, state: ProjectionState
  ) -> tuple[PyTree, ProjectionState]:
    """Returns the masks of the subset without churn, and the next state.

    The first step in which a component moves chooses the subset for good
    (App. E). A step in which nothing moves, such as the first of a warm-up,
    chooses nothing, because an empty subset would stay empty.
    """

    def choose() -> tuple[tuple[PyTree, jax.Array], ProjectionState]:
      cut, after = self.search(state._replace(chosen=()))
      packed = masks.pack(self.kept(cut))
      return (packed, masks.any_set(packed)), after

    def stay() -> tuple[tuple[PyTree, jax.Array], ProjectionState]:
      return state.chosen, state._replace(chosen=(), passes=jnp.uint32(0))

    chosen, state = lax.cond(state.chosen[1], stay, choose)
    shapes = jax.tree.unflatten(self.structure, self.tree.new)
    return masks.unpack(chosen[0], shapes), state._replace(chosen=chosen)

  def sparse_seed(
    self, keep: PyTree, budgets: Sequence[int]
  ) -> sparse_seed_lib.SparseSeed:
    """Returns the seed values of the components that differ from the seed.

    Args:
      keep: the masks of the components that stay free.
      budgets: [silos], the number of free components of each silo.
    """
    new, seed = (
      jax.tree.unflatten(self.structure, tensors)
      for tensors in (self.tree.new, self.tree.seed)
    )
    free = jax.tree.map(
      lambda mask, a, b: mask & reports.differs(a, b), keep, new, seed
    )
    return sparse_seed_lib.extract(free, seed, self.tree.layout, budgets)


def halves(budgets: Sequence[int]) -> np.ndarray:
  """Returns the upper and the lower 32 bits of budgets, uint32 [silos, 2]."""
  return np.array([divmod(n, 2**32) for n in budgets], np.uint32).reshape(-1, 2)


def search(
  threshold: str,
  layout: silos.Layout,
  epsilon: float,
  delta: float,
  iterations: int,
) -> Find:
  """Returns the search for the cuts that keep a share ε of each silo.

  Args:
    threshold: `exact`, `iterative` or `sort`; see `SubsetProjection`.
    layout: the silos.
    epsilon: ε. The exact search ignores it and uses the budgets passed to it.
    delta: δ of the iterative search.
    iterations: J of the iterative search.
  """
  if threshold == 'exact':
    return _exact
  if threshold == 'iterative':
    quotas = layout.quotas(epsilon)
    return functools.partial(_iterative, quotas, delta, iterations)
  return functools.partial(_by_sorting, layout.budgets(epsilon))


def _exact(
  tree: distance_bits.Tree, budgets: Any, state: ProjectionState
) -> tuple[thresholds.Cut, jax.Array]:
  """Finds the cuts that keep exactly the budgets, by counting."""
  return thresholds.find(
    functools.partial(counting.count, tree),
    budgets,
    tree.layout.sizes,
    guess=state.thresholds,
    # A threshold that did not move in the last steps can still move.
    spread=jnp.maximum(state.drift, 8.0),
  )


def _iterative(
  quotas: Sequence[int],
  delta: float,
  iterations: int,
  tree: distance_bits.Tree,
  budgets: Any,
  state: ProjectionState,
) -> tuple[thresholds.Cut, jax.Array]:
  """Finds the paper's approximate cuts (App. C, Alg. 2).

  Args:
    quotas: [silos], ⌊ε·|S|⌋ of each silo.
    delta: δ.
    iterations: J.
    tree: θ′ and θ⁰, and how to compute their distances.
    budgets: not used.
    state: the last state; the search starts from its thresholds.
  """
  del budgets

  def count_above(threshold: jax.Array) -> jax.Array:
    with jax.enable_x64(True):
      # The same candidate twice: XLA:CPU would count a single one on a single
      # thread.
      above = jnp.repeat(threshold[:, None].astype(jnp.uint64) + 1, 2, axis=1)
      query = thresholds.Query(
        candidates=above,
        tie=jnp.zeros_like(threshold),
        # Always true, but XLA must not see that: it would store the distances.
        active=threshold > 0,
      )
      return counting.count(tree, query)[:, 0]

  return iterative_thresholds.find(
    count_above, quotas, state.thresholds, delta, iterations
  )


def _by_sorting(
  free: Sequence[int],
  tree: distance_bits.Tree,
  budgets: Any,
  state: ProjectionState,
) -> tuple[thresholds.Cut, jax.Array]:
  """Finds the cuts that keep exactly `free` components per silo, by sorting."""
  del budgets, state
  distances = distance_bits.of_tensors(tree)
  return sorted_thresholds.find(tree.layout, distances, free), jnp.uint32(1)
