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

from collections.abc import Sequence
import dataclasses
import functools
from typing import Annotated, Any, Literal, NamedTuple, Protocol

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from dst_t5x.core import values
from dst_t5x.core.errors import UserError
from dst_t5x.method import counting
from dst_t5x.method import distance_bits
from dst_t5x.method import iterative_thresholds
from dst_t5x.method import masks
from dst_t5x.method import normalizations
from dst_t5x.method import reports
from dst_t5x.method import sharding_types
from dst_t5x.method import silos as silo_lib
from dst_t5x.method import sorted_thresholds
from dst_t5x.method import sparse_seed as sparse_seed_lib
from dst_t5x.method import thresholds

PyTree = Any

RANDOM = 'random'
Distance = Literal['absolute', 'relative', 'inverse_relative', 'random']
Threshold = Literal['exact', 'iterative', 'sort']
Silos = (
  Literal['none', 'per_module', 'per_module_and_layer', 'per_tensor']
  | silo_lib.Rules
)


class Projection(Protocol):
  """What happens to the parameters after the optimizer's step."""

  @property
  def constrains(self) -> bool:
    """Whether parameters are tied to a seed, so that one is needed."""

  @property
  def keep_seed(self) -> bool:
    """Whether the seed has to be at hand in each step."""

  def init(self, seed_params: PyTree) -> PyTree:
    """Returns the state before the first step."""

  def seed(self, params: PyTree, kept: PyTree, state: PyTree) -> PyTree:
    """Returns θ⁰: what was kept, or else rebuilt."""

  def norm_of_free(
    self, tree: PyTree, params: PyTree, kept: PyTree, state: PyTree
  ) -> jax.Array:
    """Returns the L2 norm, float32 [], over what is free in `params`."""

  def apply(
    self, new_params: PyTree, seed_params: PyTree, state: PyTree
  ) -> tuple[PyTree, PyTree]:
    """Returns the projected parameters and the next state."""


@dataclasses.dataclass(frozen=True)
class NoProjection:
  """Full fine-tuning and pretraining: every parameter is free."""

  constrains = False
  keep_seed = False

  def init(self, seed_params: PyTree) -> tuple[()]:
    """Returns an empty state."""
    del seed_params
    return ()

  def seed(self, params: PyTree, kept: PyTree, state: tuple[()]) -> PyTree:
    """Returns what was kept: nothing is needed."""
    del params, state
    return kept

  def norm_of_free(
    self, tree: PyTree, params: PyTree, kept: PyTree, state: tuple[()]
  ) -> jax.Array:
    """Returns the L2 norm of everything, float32 []."""
    del kept, state
    return reports.norm_of_free(tree, params, ())

  def apply(
    self, new_params: PyTree, seed_params: PyTree, state: tuple[()]
  ) -> tuple[PyTree, tuple[()]]:
    """Returns the parameters as they are."""
    del seed_params
    return new_params, state


class ProjectionState(NamedTuple):
  """What one step tells the next.

  Thresholds and drift make the exact search fast, without influence on its
  result; the iterative one starts from the thresholds.

  Attributes:
    thresholds: uint32 [silos], see `SubsetProjection.distances`; 0 before the
      first step.
    drift: float32 [silos], running mean of how far a threshold moves in a
      step, in units of the last bit.
    passes: uint32 [], passes over the parameters that the last step took.
    scales: float32 [groups], what distances are divided by; () if by nothing.
    chosen: without churn, the subset as `masks.pack` has it and whether it is
      chosen for good, bool []; else ().
    sparse_seed: what gives the seed back from θᵗ; () where it is kept.
  """

  thresholds: jax.Array
  drift: jax.Array
  passes: jax.Array
  scales: jax.Array | tuple[()] = ()
  chosen: Any = ()
  sparse_seed: sparse_seed_lib.SparseSeed | tuple[()] = ()


class Numbers(NamedTuple):
  """The settings of a `SubsetProjection` that its program does not depend on.

  Attributes:
    budgets: uint32 [silos, 2], the free components of each silo: upper and
      lower half.
    salts: uint32 [slices], see `keys.salts`.
  """

  budgets: Any
  salts: Any


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
    silos: a name in `silos.SILOS` (Section 2, App. A), or rules of one's own,
      pairs of a regular expression over paths and a silo's name.
    exclude: regular expressions over paths of what stays frozen. The budget is
      a share of the rest.
    normalization: what distances are divided by, a name in
      `normalizations.NORMALIZATIONS`; goes with silos='none' (App. B).
    normalize_over: whose size or mean it is, a siloing (Table 3).
    churn: whether the subset is chosen anew in each step; without, it stays
      that of the first step in which anything moved (App. E, Table 7).
    threshold: `exact`; `iterative`, the paper's approximation (App. C, Alg. 2);
      or `sort`, exact and slow.
    delta: δ of the iterative threshold.
    iterations: J of the iterative threshold.
    keep_seed: whether θ⁰ is at hand in each step. Without, only the seeds of
      what is free are kept, and `seed` rebuilds θ⁰ for the step: memory for
      one copy of the parameters less, for some time more; on one device.
    random_seed: what the `random` distance is drawn from.

  Raises:
    UserError: a value that is out of range or unknown.
  """

  epsilon: values.Share
  distance: Distance = 'inverse_relative'
  silos: Silos = 'per_module_and_layer'
  exclude: Sequence[str] = ()
  normalization: Literal['size', 'mean'] | None = None
  normalize_over: Silos = 'per_module_and_layer'
  churn: bool = True
  threshold: Threshold = 'exact'
  delta: Annotated[float, values.Range(1, above=True)] = 2.0
  iterations: values.Positive = 10
  keep_seed: bool = True
  random_seed: values.RandomSeed = 0

  constrains = True

  def __post_init__(self) -> None:
    values.check_fields(self)
    if self.normalization is not None and self.distance == RANDOM:
      raise UserError('a random distance is not normalized')
    if not self.keep_seed and self.threshold == 'iterative':
      raise UserError(
        'keep_seed=False needs exact budgets: use another threshold'
      )
    for name in ('silos', 'normalize_over'):
      rules = getattr(self, name)
      silo_lib.named(rules)
      if not isinstance(rules, str):  # Lists come from gin; `jit` hashes us.
        object.__setattr__(self, name, tuple(tuple(rule) for rule in rules))
    object.__setattr__(self, 'exclude', tuple(self.exclude))

  def layout(self, params: PyTree) -> silo_lib.Layout:
    """Returns the partition of `params` into silos."""
    return silo_lib.make_layout(params, self.silos, self.exclude)

  def split(
    self, params: PyTree
  ) -> tuple['SubsetProjection', Numbers | tuple[()]]:
    """Returns what is compiled, and the numbers that go to its `apply`.

    ε and random seeds then are no constants of the step, which is compiled
    once for all of them. Without numbers, (), everything is in the program.

    Args:
      params: the trained parameters, or their shapes.
    """
    if self.threshold != 'exact' or not self.keep_seed:
      return self, ()
    layout = self.layout(params)
    halves = _halves(layout.budgets(self.epsilon))
    shapes = [tensor.shape for tensor in jax.tree.leaves(params)]
    salts = distance_bits.salts(layout, shapes, self.random_seed)
    program = dataclasses.replace(self, epsilon=1.0, random_seed=0)
    return program, Numbers(halves, np.asarray(salts))

  def init(self, seed_params: PyTree) -> ProjectionState:
    """Returns the state before the first step.

    Args:
      seed_params: θ⁰.

    Raises:
      UserError: silos or exclusions do not fit the parameters.
    """
    layout = self.layout(seed_params)
    silos = len(layout.names)
    scales: jax.Array | tuple[()] = ()
    if self.normalization is not None:
      groups = silo_lib.make_layout(seed_params, self.normalize_over)
      scale = normalizations.NORMALIZATIONS[self.normalization]
      scales = sharding_types.hide(functools.partial(scale, groups))(
        seed_params
      )
    chosen: Any = ()
    if not self.churn:
      chosen = masks.nothing(seed_params), jnp.asarray(False)
    return ProjectionState(
      thresholds=jnp.zeros((silos,), jnp.uint32),
      drift=jnp.zeros((silos,), jnp.float32),
      passes=jnp.zeros((), jnp.uint32),
      scales=scales,
      chosen=chosen,
      sparse_seed=()
      if self.keep_seed
      else sparse_seed_lib.nothing(seed_params, layout.budgets(self.epsilon)),
    )

  def distances(self, thresholds: np.ndarray) -> np.ndarray:
    """Returns thresholds of a state as distances, to be reported.

    Args:
      thresholds: uint32 [silos].

    Returns:
      float64 [silos]. Of a random distance, the share of possible scores that
      are below.
    """
    if self.distance == RANDOM:
      return thresholds / 2.0**31
    return thresholds.view(np.float32).astype(np.float64)

  def seed(
    self, params: PyTree, kept: PyTree, state: ProjectionState
  ) -> PyTree:
    """Returns θ⁰: what was kept, or else rebuilt from θᵗ bit for bit.

    Args:
      params: θᵗ.
      kept: θ⁰ if `keep_seed`, else anything.
      state: that goes with θᵗ.
    """
    if not state.sparse_seed:
      return kept
    layout = self.layout(params)
    budget = layout.budgets(self.epsilon)
    return sparse_seed_lib.rebuild(state.sparse_seed, layout, params, budget)

  def norm_of_free(
    self, tree: PyTree, params: PyTree, kept: PyTree, state: ProjectionState
  ) -> jax.Array:
    """Returns the L2 norm, float32 [], of gradients or updates over the subset.

    Args:
      tree: gradients or updates.
      params: θᵗ.
      kept: θ⁰ if `keep_seed`, else anything.
      state: that goes with θᵗ.
    """
    if not state.sparse_seed:
      return reports.norm_of_free(tree, params, kept)
    layout = self.layout(params)
    budget = layout.budgets(self.epsilon)
    return sparse_seed_lib.norm(state.sparse_seed, layout, tree, budget)

  def apply(
    self,
    new_params: PyTree,
    seed_params: PyTree,
    state: ProjectionState,
    numbers: Numbers | tuple[()] = (),
  ) -> tuple[PyTree, ProjectionState]:
    """Resets all but the farthest components to the seed (Eq. 6, 7).

    Args:
      new_params: θ′, the parameters after the optimizer's step. Values that
        are not finite count as the farthest; see `Trainer.train_step`.
      seed_params: θ⁰, a tree of the same structure, shapes and dtypes: see
        `seed` if it is not kept.
      state: what `init` or the last `apply` returned.
      numbers: that `split` returned, where this is its program.

    Returns:
      θᵗ⁺¹ and the next state.
    """
    apply = sharding_types.hide(self._apply, results=(new_params, state))
    return apply(new_params, seed_params, state, numbers)

  def _apply(
    self,
    new_params: PyTree,
    seed_params: PyTree,
    state: ProjectionState,
    numbers: Numbers | tuple[()],
  ) -> tuple[PyTree, ProjectionState]:
    # XLA may compute θ′ anew, with other roundings, wherever it is used. The
    # barrier makes counts and mask see the same numbers.
    new_params, seed_params = lax.optimization_barrier(
      (new_params, seed_params)
    )
    step = _Step(self, new_params, seed_params, state.scales, numbers)
    if not state.chosen:
      cut, state = step.search(state)
      keep = step.kept(cut)
    else:
      keep, state = step.kept_without_churn(state)
    if not self.keep_seed:
      listed = step.listed(keep)
      state = state._replace(sparse_seed=listed)
    # A select, never an added difference: p + (s - p) misses s's bits.
    return jax.tree.map(lax.select, keep, new_params, seed_params), state


class _Step:
  """One step's distances, and what is found out about them."""

  def __init__(
    self,
    method: SubsetProjection,
    new_params: PyTree,
    seed_params: PyTree,
    scales: jax.Array | tuple[()],
    numbers: Numbers | tuple[()],
  ) -> None:
    self._method = method
    self._layout = method.layout(new_params)
    self._budgets = self._layout.budgets(method.epsilon)
    self._halves = numbers.budgets if numbers else _halves(self._budgets)
    new, self._structure = jax.tree.flatten(new_params)
    is_normalized = method.normalization is not None
    if is_normalized:
      of_slices = _scales_of_slices(method, new_params, scales)
    elif numbers:
      of_slices = jnp.asarray(numbers.salts)
    else:
      shapes = [tensor.shape for tensor in new]
      of_slices = distance_bits.salts(self._layout, shapes, method.random_seed)
    self._tree = distance_bits.Tree(
      self._layout,
      distance_bits.random
      if method.distance == RANDOM
      else distance_bits.measured(method.distance, is_normalized),
      new,
      jax.tree.leaves(seed_params),
      of_slices,
    )

  def search(
    self, state: ProjectionState
  ) -> tuple[thresholds.Cut, ProjectionState]:
    """Finds the cut of every silo, starting from the last step's."""
    passes = jnp.uint32(1)
    if self._method.threshold == 'exact':
      cut, passes = thresholds.find(
        functools.partial(counting.count, self._tree),
        self._halves,
        self._layout.sizes,
        guess=state.thresholds,
        # A threshold that stood still may yet move a little.
        spread=jnp.maximum(state.drift, 8.0),
      )
    elif self._method.threshold == 'iterative':
      cut, passes = iterative_thresholds.find(
        self._count_above,
        self._layout.quotas(self._method.epsilon),
        state.thresholds,
        self._method.delta,
        self._method.iterations,
      )
    else:
      cut = sorted_thresholds.find(
        self._layout, distance_bits.of_tensors(self._tree), self._budgets
      )
    now = cut.threshold.astype(jnp.float32)
    moved = jnp.abs(now - state.thresholds.astype(jnp.float32))
    drift = jnp.where(
      # The first distance is that from nothing; 2²⁰ keys are 9 %.
      state.thresholds == 0,
      2.0**20,
      0.7 * state.drift + 0.3 * moved,
    )
    searched = jnp.any(jnp.asarray(self._halves) > 0, axis=1)
    return cut, state._replace(
      thresholds=jnp.where(searched, cut.threshold, 0),
      drift=drift,
      passes=passes,
    )

  def _count_above(self, threshold: jax.Array) -> jax.Array:
    with jax.enable_x64(True):
      # Twice the same: XLA:CPU counts one candidate on a single thread.
      above = jnp.repeat(threshold[:, None].astype(jnp.uint64) + 1, 2, axis=1)
      query = thresholds.Query(
        candidates=above,
        tie=jnp.zeros_like(threshold),
        # Always so, which XLA must not know, or it stores the distances.
        active=threshold > 0,
      )
      return counting.count(self._tree, query)[:, 0]

  def kept(self, cut: thresholds.Cut) -> PyTree:
    """Returns the tree of masks: which components stay free."""
    return jax.tree.unflatten(
      self._structure, distance_bits.kept(self._tree, cut)
    )

  def kept_without_churn(
    self, state: ProjectionState
  ) -> tuple[PyTree, ProjectionState]:
    """Returns the masks that stay, chosen in this step or an earlier one.

    A step in which nothing moved, such as the first of a warm-up, chooses
    nothing: an empty subset would stay empty.
    """

    def choose() -> tuple[tuple[PyTree, jax.Array], ProjectionState]:
      cut, after = self.search(state._replace(chosen=()))
      found = masks.pack(self.kept(cut))
      return (found, masks.any_set(found)), after

    def stay() -> tuple[tuple[PyTree, jax.Array], ProjectionState]:
      return state.chosen, state._replace(chosen=(), passes=jnp.uint32(0))

    chosen, state = lax.cond(state.chosen[1], stay, choose)
    shapes = jax.tree.unflatten(self._structure, self._tree.new)
    return masks.unpack(chosen[0], shapes), state._replace(chosen=chosen)

  def listed(self, keep: PyTree) -> sparse_seed_lib.SparseSeed:
    """Returns the seeds of what stays free and is not as it was."""
    new, seed = (
      jax.tree.unflatten(self._structure, x)
      for x in (self._tree.new, self._tree.seed)
    )
    free = jax.tree.map(
      lambda mask, a, b: mask & reports.differs(a, b), keep, new, seed
    )
    return sparse_seed_lib.extract(free, seed, self._layout, self._budgets)


def _halves(budgets: Sequence[int]) -> np.ndarray:
  """Returns uint32 [silos, 2], as `Numbers.budgets`."""
  return np.array([divmod(n, 2**32) for n in budgets], np.uint32).reshape(-1, 2)


def _scales_of_slices(
  method: SubsetProjection, params: PyTree, scales: jax.Array | tuple[()]
) -> jax.Array:
  """Returns the bit patterns of what distances are divided by, [slices]."""
  groups = silo_lib.make_layout(params, method.normalize_over)
  group = np.array([i for leaf in groups.leaves for i in leaf.silos])
  return lax.bitcast_convert_type(jnp.asarray(scales)[group], jnp.uint32)
