"""The projection onto the parameters that differ from the seed in few places.

One step of Dynamic Subset Tuning is an ordinary optimizer step followed by
`projection.apply` (paper, Alg. 1). Of every silo the components that moved
farthest from the seed stay as they are (Eq. 6, 7); all others become the
seed's, bit for bit.

In any JAX loop, here Optax's AdaFactor on a toy:

>>> import optax
>>> seed = {'mlp': {'kernel': jnp.arange(1.0, 201.0).reshape(10, 20)}}
>>> optimizer, projection = optax.adafactor(0.1), SubsetProjection(epsilon=0.02)
>>> @jax.jit
... def step(params, optimizer_state, state):
...   gradients = jax.grad(lambda p: jnp.sum(p['mlp']['kernel'] ** 2))(params)
...   updates, optimizer_state = optimizer.update(
...       gradients, optimizer_state, params)
...   params = optax.apply_updates(params, updates)
...   params, state = projection.apply(params, seed, state)
...   return params, optimizer_state, state
>>> carry = seed, optimizer.init(seed), projection.init(seed)
>>> for _ in range(3):
...   carry = step(*carry)
>>> int(jnp.sum(carry[0]['mlp']['kernel'] != seed['mlp']['kernel']))
4
"""

import collections
from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any, NamedTuple, Protocol
import zlib

import jax
from jax import lax
import jax.numpy as jnp

from dst_t5x import budgets
from dst_t5x import distances
from dst_t5x import silos as silo_lib
from dst_t5x import thresholds
from dst_t5x.errors import UserError, nearest

PyTree = Any

RANDOM = 'random'


class Projection(Protocol):
  """What happens to the parameters after the optimizer's step."""

  @property
  def constrains(self) -> bool:
    """Whether parameters are tied to a seed, so that one is needed."""

  def init(self, seed_params: PyTree) -> PyTree:
    """Returns the state before the first step."""

  def apply(
    self, new_params: PyTree, seed_params: PyTree, state: PyTree
  ) -> tuple[PyTree, PyTree]:
    """Returns the projected parameters and the next state."""


@dataclasses.dataclass(frozen=True)
class NoProjection:
  """Full fine-tuning and pretraining: every parameter is free."""

  constrains = False

  def init(self, seed_params: PyTree) -> tuple[()]:
    """Returns an empty state."""
    del seed_params
    return ()

  def apply(
    self, new_params: PyTree, seed_params: PyTree, state: tuple[()]
  ) -> tuple[PyTree, tuple[()]]:
    """Returns the parameters as they are."""
    del seed_params
    return new_params, state


class ProjectionState(NamedTuple):
  """What one step tells the next: where thresholds are, how fast they move.

  It makes the search fast and has no influence on its result.

  Attributes:
    thresholds: uint32 [silos], float32 bit patterns; 0 before the first step.
    drift: float32 [silos], running mean of how far a threshold moves in a
      step, in units of the last bit.
    passes: uint32 [], passes over the parameters that the last step took.
  """

  thresholds: jax.Array
  drift: jax.Array
  passes: jax.Array


@dataclasses.dataclass(frozen=True)
class SubsetProjection:
  """Keeps the ε·|S| components of every silo that are farthest from the seed.

  Exact where the paper approximates (App. C): after `apply` every silo has
  exactly its budget of components that differ from the seed, or fewer where
  fewer have a distance above zero. Ties are broken by position, the earlier
  component first. Pure, jittable, and free of any trainer.

  Attributes:
    epsilon: ε in (0, 1], the share of parameters that are free (Eq. 1).
    distance: ρ, a name in `distances.DISTANCES`, or `random` for the baseline
      whose subset is drawn once and never changes (Table 1, Table 2).
    silos: a name in `silos.SILOS` (Section 2, App. A).
    random_seed: what the `random` distance is drawn from.

  Raises:
    UserError: ε out of range, or an unknown distance.
  """

  epsilon: float
  distance: str = 'inverse_relative'
  silos: str = 'per_module_and_layer'
  random_seed: int = 0

  constrains = True

  def __post_init__(self) -> None:
    budgets.check_epsilon(self.epsilon)
    known = [*distances.DISTANCES, RANDOM]
    if self.distance not in known:
      raise UserError(
        f'no distance {self.distance!r}{nearest(self.distance, known)} '
        f'(known: {sorted(known)})'
      )

  def layout(self, params: PyTree) -> silo_lib.Layout:
    """Returns the partition of `params` into silos."""
    return silo_lib.make_layout(params, self.silos)

  def init(self, seed_params: PyTree) -> ProjectionState:
    """Returns the state before the first step."""
    silos = len(self.layout(seed_params).names)
    return ProjectionState(
      thresholds=jnp.zeros((silos,), jnp.uint32),
      drift=jnp.zeros((silos,), jnp.float32),
      passes=jnp.zeros((), jnp.uint32),
    )

  def apply(
    self, new_params: PyTree, seed_params: PyTree, state: ProjectionState
  ) -> tuple[PyTree, ProjectionState]:
    """Resets all but the farthest components to the seed (Eq. 6, 7).

    Args:
      new_params: θ′, the parameters after the optimizer's step.
      seed_params: θ⁰, a tree of the same structure, shapes and dtypes.
      state: what `init` or the last `apply` returned.

    Returns:
      θᵗ⁺¹ and the next state.
    """
    layout = self.layout(new_params)
    # XLA may compute θ′ anew, with other roundings, wherever it is used. The
    # barrier makes counts and mask see the same numbers.
    new_params, seed_params = lax.optimization_barrier(
      (new_params, seed_params)
    )
    new, tree = jax.tree.flatten(new_params)
    seed = jax.tree.leaves(seed_params)
    cut, state = self._search(layout, new, seed, state)
    # A select, never an added difference: p + (s - p) misses s's bits.
    kept = [
      jnp.where(self._keep(leaf, layout, cut, a, b), a, b)
      for leaf, a, b in zip(layout.leaves, new, seed, strict=True)
    ]
    return jax.tree.unflatten(tree, kept), state

  def _search(
    self,
    layout: silo_lib.Layout,
    new: Sequence[jax.Array],
    seed: Sequence[jax.Array],
    state: ProjectionState,
  ) -> tuple[thresholds.Cut, ProjectionState]:
    """Finds the cut of every silo, starting from the last step's."""
    budget = jnp.asarray(layout.budgets(self.epsilon), jnp.uint32)

    def keys(i: int) -> jax.Array:
      return self._keys(layout.leaves[i], layout, new[i], seed[i])

    cut, passes = thresholds.find(
      lambda query: _count(layout, keys, query),
      budget,
      jnp.asarray(layout.sizes, jnp.uint32),
      guess=state.thresholds,
      # A threshold that stood still may yet move a little.
      spread=jnp.maximum(state.drift, 8.0),
    )
    now = cut.threshold.astype(jnp.float32)
    moved = jnp.abs(now - state.thresholds.astype(jnp.float32))
    drift = jnp.where(
      # The first distance is that from nothing; 2²⁰ keys are 9 %.
      state.thresholds == 0,
      2.0**20,
      0.7 * state.drift + 0.3 * moved,
    )
    return cut, ProjectionState(
      thresholds=jnp.where(budget > 0, cut.threshold, 0),
      drift=drift,
      passes=passes,
    )

  def _keep(
    self,
    leaf: silo_lib.Leaf,
    layout: silo_lib.Layout,
    cut: thresholds.Cut,
    new: jax.Array,
    seed: jax.Array,
  ) -> jax.Array:
    """Returns bool, of the tensor's shape: which components stay free."""
    # Nothing but elementwise work on the tensor: a reshape in between, and XLA
    # would not write the result in the tensor's place.
    keys = self._keys(leaf, layout, new, seed)
    threshold, before = (_columns(_rows(x, leaf.silos), keys.ndim) for x in cut)
    early = _positions(leaf, keys.shape) < before
    return (keys > threshold) | ((keys == threshold) & early)

  def _keys(
    self,
    leaf: silo_lib.Leaf,
    layout: silo_lib.Layout,
    new: jax.Array,
    seed: jax.Array,
  ) -> jax.Array:
    """Returns uint32, of the tensor's shape: distances, ordered as integers."""
    if self.distance == RANDOM:
      names = [f'{self.random_seed} {layout.names[i]}' for i in leaf.silos]
      hashes = jnp.asarray([zlib.crc32(n.encode()) for n in names], jnp.uint32)
      return distances.random_scores(
        _positions(leaf, new.shape), _columns(hashes, new.ndim)
      )
    distance = distances.DISTANCES[self.distance](new, seed)
    return lax.bitcast_convert_type(distance, jnp.uint32)


def _positions(leaf: silo_lib.Leaf, shape: tuple[int, ...]) -> jax.Array:
  """Returns uint32 [*shape]: where each component is in its silo."""
  position = _columns(jnp.asarray(leaf.offsets, jnp.uint32), len(shape))
  stride = 1
  for axis in range(len(shape) - 1, int(leaf.stacked) - 1, -1):
    along = lax.broadcasted_iota(jnp.uint32, shape, axis)
    position = position + along * jnp.uint32(stride)
    stride *= shape[axis]
  return position


def _columns(values: jax.Array, ndim: int) -> jax.Array:
  """Returns [slices] with `ndim` axes, to go with a tensor of so many."""
  return values.reshape((len(values), *[1] * (ndim - 1))[:ndim])


def _rows(values: jax.Array, silos: Sequence[int]) -> jax.Array:
  """Returns the rows of some silos; a single one without a gather."""
  if len(silos) == 1:
    return lax.slice_in_dim(values, silos[0], silos[0] + 1)
  return values[jnp.asarray(silos)]


def _count(
  layout: silo_lib.Layout,
  keys: Callable[[int], jax.Array],
  query: thresholds.Query,
) -> jax.Array:
  """Answers a query of the search with one pass over the parameters.

  Args:
    layout: the silos.
    keys: index of a leaf -> its keys, uint32, of the tensor's shape.
    query: what to count.

  Returns:
    uint32 [silos, candidates]; rows of inactive silos may be too low.
  """
  leaves_of = collections.defaultdict(list)
  for i, leaf in enumerate(layout.leaves):
    leaves_of[leaf.silos].append(i)
  rows: dict[int, list[jax.Array]] = collections.defaultdict(list)
  for silos, leaves in leaves_of.items():

    def counted(
      here: thresholds.Query, leaves: list[int] = leaves
    ) -> jax.Array:
      counts = [_count_leaf(layout.leaves[i], keys(i), here) for i in leaves]
      return functools.reduce(jnp.add, counts)

    def skipped(here: thresholds.Query) -> jax.Array:
      return jnp.zeros_like(here.candidates)

    # The branch skips finished silos. It also keeps XLA from computing the
    # distances once, outside of the loop, and storing them.
    here = thresholds.Query(*(_rows(x, silos) for x in query))
    counts = lax.cond(jnp.any(here.active), counted, skipped, here)
    for slice_index, silo in enumerate(silos):
      rows[silo].append(counts[slice_index])
  return jnp.stack([sum(rows[silo]) for silo in range(len(layout.names))])


def _count_leaf(
  leaf: silo_lib.Leaf, keys: jax.Array, query: thresholds.Query
) -> jax.Array:
  """Returns uint32 [slices, candidates]: one tensor's part of the counts."""
  tie = _columns(query.tie, keys.ndim)
  from_first = thresholds.FIRST - _positions(leaf, keys.shape)
  early = jnp.where(keys == tie, from_first, 0)
  keys = jnp.where(tie == 0, keys, early)
  if not leaf.stacked:
    keys = keys[None]
  return _reach(keys, query.candidates)


def _reach(keys: jax.Array, candidates: jax.Array) -> jax.Array:
  """Counts the keys of each slice that reach each candidate in one pass.

  Args:
    keys: uint32 [slices, …].
    candidates: uint32 [slices, candidates].

  Returns:
    uint32 [slices, candidates].
  """
  keys = keys.reshape((*keys.shape, *([1] * (2 - keys.ndim))))
  columns = candidates.T.reshape(
    (candidates.shape[1], len(keys)) + (1,) * (keys.ndim - 1)
  )
  reached = [(keys >= column).astype(jnp.uint32) for column in columns]
  zeros = [jnp.uint32(0)] * len(reached)

  def add(a: Any, b: Any) -> Any:
    return [x + y for x, y in zip(a, b, strict=True)]

  # One reduction with several results reads the keys once. The last axis goes
  # first: XLA:CPU runs a reduction of everything on a single thread.
  rows = lax.reduce(reached, zeros, add, (keys.ndim - 1,))
  counts = lax.reduce(rows, zeros, add, tuple(range(1, keys.ndim - 1)))
  return jnp.stack(counts, axis=-1)
