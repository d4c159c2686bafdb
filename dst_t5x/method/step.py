"""One step of the subset method: from θ′ and θ⁰ to the masks of what stays.

Distances, the search for the cut of every silo (App. C), and the masks (Eq. 7).
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
  """What one step tells the next.

  Thresholds and drift make the exact search fast, without influence on its
  result. The iterative search starts from the thresholds.

  Attributes:
    thresholds: uint32 [silos], bit patterns of distances; 0 before the first
      step.
    drift: float32 [silos], running mean of how far a threshold moves in a
      step, in units of the last bit.
    passes: uint32 [], passes over the parameters that the last step took.
    scales: float32 [groups], what distances are divided by; () if by nothing.
    chosen: without churn, the subset as `masks.pack` returns it and whether it
      is chosen for good, bool []; else ().
    sparse_seed: what gives the seed back from θᵗ; () where it is kept.
  """

  thresholds: jax.Array
  drift: jax.Array
  passes: jax.Array
  scales: jax.Array | tuple[()] = ()
  chosen: Any = ()
  sparse_seed: sparse_seed_lib.SparseSeed | tuple[()] = ()


# Tree, budgets and state -> cuts, and the passes over the parameters.
Find = Callable[
  [distance_bits.Tree, Any, ProjectionState],
  tuple[thresholds.Cut, jax.Array],
]


class Step(NamedTuple):
  """One step's parameters, and how their cuts are found.

  Attributes:
    tree: the distances of θ′ from θ⁰, silo by silo.
    structure: of the parameters' tree.
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
    """Finds the cut of every silo, starting from the last step's."""
    cut, passes = self.find(self.tree, self.budgets, state)
    now = cut.threshold.astype(jnp.float32)
    moved = jnp.abs(now - state.thresholds.astype(jnp.float32))
    drift = jnp.where(
      # The first distance is that from nothing; 2²⁰ bit patterns are 9 %.
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
    """Returns the tree of masks: which components stay free."""
    return jax.tree.unflatten(
      self.structure, distance_bits.kept(self.tree, cut)
    )

  def kept_without_churn(
    self, state: ProjectionState
  ) -> tuple[PyTree, ProjectionState]:
    """Returns the masks of the first step in which anything moved (App. E).

    A step in which nothing moved, such as the first of a warm-up, chooses
    nothing: an empty subset would stay empty.
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
    """Returns the seeds of what stays free and differs from them.

    Args:
      keep: the masks of what stays free.
      budgets: [silos] free components of each silo.
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
  """Returns budgets as uint32 [silos, 2]: their upper and lower 32 bits."""
  return np.array([divmod(n, 2**32) for n in budgets], np.uint32).reshape(-1, 2)


def search(
  threshold: str,
  layout: silos.Layout,
  epsilon: float,
  delta: float,
  iterations: int,
) -> Find:
  """Returns the search for the cuts that keep ε of each silo.

  Args:
    threshold: `exact`, `iterative` or `sort`; see `SubsetProjection`.
    layout: the silos.
    epsilon: ε. The exact search takes the budgets that it is called with.
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
  """Finds cuts that keep exactly the budgets, by counting."""
  return thresholds.find(
    functools.partial(counting.count, tree),
    budgets,
    tree.layout.sizes,
    guess=state.thresholds,
    # A threshold that stood still may yet move a little.
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
    quotas: [silos] ⌊ε·|S|⌋.
    delta: δ.
    iterations: J.
    tree: the distances.
    budgets: not used.
    state: whose thresholds the search starts from.
  """
  del budgets

  def count_above(threshold: jax.Array) -> jax.Array:
    with jax.enable_x64(True):
      # Twice the same: XLA:CPU counts one candidate on a single thread.
      above = jnp.repeat(threshold[:, None].astype(jnp.uint64) + 1, 2, axis=1)
      query = thresholds.Query(
        candidates=above,
        tie=jnp.zeros_like(threshold),
        # Always so, which XLA must not know, or it stores the distances.
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
  """Finds cuts that keep exactly `free` components of each silo, by sorting."""
  del budgets, state
  distances = distance_bits.of_tensors(tree)
  return sorted_thresholds.find(tree.layout, distances, free), jnp.uint32(1)
