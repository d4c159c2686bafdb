"""The projection that resets most components of the parameters to the seed.

One step of Dynamic Subset Tuning is an ordinary optimizer step followed by
`projection.apply` (paper, Alg. 1). In every silo, the components that moved
farthest from the seed keep their values (Eq. 6, 7). All others are reset to the
seed, bit for bit.
"""

from collections.abc import Sequence
import dataclasses
import functools
from typing import Annotated, Any, Literal

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from dst_t5x.core import json_text
from dst_t5x.core import values
from dst_t5x.core.errors import UserError
from dst_t5x.method import api
from dst_t5x.method import distance_bits
from dst_t5x.method import masks
from dst_t5x.method import normalizations
from dst_t5x.method import reports
from dst_t5x.method import schedules
from dst_t5x.method import sharding_types
from dst_t5x.method import silos as silo_lib
from dst_t5x.method import sparse_seed as sparse_seed_lib
from dst_t5x.method import step as step_lib
from dst_t5x.method.full import NoProjection as NoProjection
from dst_t5x.method.step import ProjectionState

PyTree = Any

RANDOM = 'random'
Distance = Literal['absolute', 'relative', 'inverse_relative', 'random']
Threshold = Literal['exact', 'iterative', 'sort']


@dataclasses.dataclass(frozen=True)
class SubsetProjection(api.Projection):
  """Keeps the ε·|S| components of every silo that are farthest from the seed.

  Exact where the paper approximates (App. C): after `apply`, exactly the budget
  of each silo differs from the seed, or fewer if fewer components moved. Ties
  are broken by position, the earlier component first. All functions are pure
  and can be jitted.

  Attributes:
    epsilon: ε in (0, 1], the share of parameters that are free (Eq. 1).
    distance: ρ, a name in `distances.DISTANCES`, or `random` for the baseline
      whose subset is drawn once and never changes (Table 1, Table 2).
    silos: a name in `silos.SILOS` (Section 2, App. A), or rules: pairs of a
      regular expression for paths and a silo's name.
    exclude: regular expressions for the paths of frozen tensors. The budget is
      a share of the other tensors.
    normalization: a name in `normalizations.NORMALIZATIONS`, the divisor of
      distances; for silos='none' (App. B).
    normalize_over: the silos over which the divisor is computed (Table 3).
    churn: whether each step chooses a new subset. If False, the first step in
      which a component moves chooses it for good (App. E, Table 7).
    threshold: `exact`; `iterative`, the paper's approximation (App. C, Alg. 2);
      or `sort`, exact and slow.
    delta: δ of the iterative threshold.
    iterations: J of the iterative threshold.
    keep_seed: whether each step gets a copy of θ⁰. If False, the state lists
      the seed values of the free components, and `seed` rebuilds θ⁰ in each
      step. This saves the memory of one copy of the parameters and costs time.
      It works on one device only.
    random_seed: the seed of the `random` distance.
    epsilon_schedule: how ε shrinks from `epsilon_start` to `epsilon`:
      `constant`, it does not; `linear`, `cosine`, or `cubic` as in gradual
      pruning. The budget of every silo is exact at every step.
    epsilon_start: the first ε of a budget that shrinks.
    epsilon_steps: after how many steps `epsilon` is reached.

  Raises:
    UserError: a value is out of range or unknown.
  """

  widens_seed = True

  epsilon: values.Share
  distance: Distance = 'inverse_relative'
  silos: silo_lib.Silos = 'per_module_and_layer'
  exclude: Sequence[str] = ()
  normalization: Literal['size', 'mean'] | None = None
  normalize_over: silo_lib.Silos = 'per_module_and_layer'
  churn: bool = True
  threshold: Threshold = 'exact'
  delta: Annotated[float, values.Range(1, above=True)] = 2.0
  iterations: values.Positive = 10
  keep_seed: bool = True
  random_seed: values.RandomSeed = 0
  epsilon_schedule: schedules.Shape = 'constant'
  epsilon_start: values.Share | None = None
  epsilon_steps: values.Positive | None = None

  def __post_init__(self) -> None:
    values.check_fields(self)
    if not self.schedule.is_constant and (
      self.threshold != 'exact' or not self.keep_seed
    ):
      raise UserError(
        f'EPSILON_SCHEDULE = {self.epsilon_schedule!r} needs '
        "THRESHOLD = 'exact' and KEEP_SEED = True"
      )
    if self.normalization is not None and self.distance == RANDOM:
      raise UserError('a random distance is not normalized')
    if not self.keep_seed and self.threshold == 'iterative':
      raise UserError(
        'keep_seed=False needs exact budgets: use another threshold'
      )
    for name in ('silos', 'normalize_over'):
      object.__setattr__(self, name, silo_lib.checked(getattr(self, name)))
    object.__setattr__(self, 'exclude', tuple(self.exclude))

  @property
  def keeps_to_budget(self) -> bool:  # type: ignore[override]
    """Whether budgets are exact; the iterative threshold can exceed them."""
    return self.threshold != 'iterative'

  @property
  def schedule(self) -> schedules.Schedule:
    """How ε changes with the step."""
    return schedules.of(self)

  def layout(self, params: PyTree) -> silo_lib.Layout:
    """Returns the partition of `params` into silos."""
    return silo_lib.make_layout(params, self.silos, self.exclude)

  def settings(self) -> dict[str, Any]:
    """Returns the method's name, `dst` or `random`, and its settings."""
    name = 'random' if self.distance == RANDOM else 'dst'
    settings = json_text.plain(dataclasses.asdict(self))
    return {'method': name} | self.schedule.without_idle(settings)

  def free(self, shapes: PyTree) -> int:
    """Returns how many parameters are free, the sum of all budgets."""
    return sum(self.layout(shapes).budgets(self.epsilon))

  def free_at_most(self, shapes: PyTree) -> int:
    """Returns how many parameters are free at the start of the schedule."""
    return sum(self.layout(shapes).budgets(self.schedule.most))

  def table(self, shapes: PyTree) -> str:
    """Returns a text table of the budget of each silo."""
    layout = self.layout(shapes)
    return layout.share_of_included(self.epsilon) + layout.table(self.epsilon)

  def scalars(self, shapes: PyTree, state: ProjectionState) -> dict[str, float]:
    """Returns the number of passes, and each module's mean threshold.

    A threshold is a distance. For the random distance, it is the share of
    possible scores below the threshold.
    """
    thresholds = np.asarray(state.thresholds)
    if self.distance == RANDOM:
      distances = thresholds / 2.0**31
    else:
      distances = thresholds.view(np.float32).astype(np.float64)
    means = reports.means_of_modules(self.layout(shapes), distances)
    return {'speed/projection_passes': float(state.passes)} | {
      f'threshold/{module}': mean for module, mean in means.items()
    }

  def may_have_made(self, params: PyTree, seed_params: PyTree) -> bool:
    """Returns whether each silo's free components are within its budget."""
    layout = self.layout(params)
    most = np.array(layout.budgets(self.schedule.most))
    if self.threshold == 'iterative':  # It can exceed the budget.
      most = np.maximum(most, np.array(layout.sizes) // 2)
    free = reports.count_free(layout, params, seed_params)
    return bool((free <= most).all())

  def prepare(self, shapes: PyTree) -> api.Program:
    """Returns the program that a step calls.

    With the exact threshold and a kept seed, ε and the random seed are leaves
    of the program, and can change without recompilation.
    """
    if self.threshold != 'exact' or not self.keep_seed:
      return self
    layout = self.layout(shapes)
    tensors = [tensor.shape for tensor in jax.tree.leaves(shapes)]
    return _Prepared(
      dataclasses.replace(self, epsilon=1.0, epsilon_start=1.0, random_seed=0),
      budgets=self.schedule.table(layout),
      salts=np.asarray(distance_bits.salts(layout, tensors, self.random_seed)),
    )

  def init(self, seed_params: PyTree) -> ProjectionState:
    """Returns the state before the first step.

    Args:
      seed_params: θ⁰.

    Raises:
      UserError: `silos` or `exclude` do not fit the parameters.
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

  def seed(
    self, params: PyTree, kept: PyTree, state: ProjectionState
  ) -> PyTree:
    """Returns θ⁰: the kept copy, or θ⁰ rebuilt bit for bit from θᵗ.

    Args:
      params: θᵗ.
      kept: θ⁰ if `keep_seed`; ignored otherwise.
      state: the state at step t.
    """
    if not state.sparse_seed:
      return kept
    layout = self.layout(params)
    budget = layout.budgets(self.epsilon)
    return sparse_seed_lib.rebuild(state.sparse_seed, layout, params, budget)

  def norm_of_free(
    self, tree: PyTree, params: PyTree, kept: PyTree, state: ProjectionState
  ) -> jax.Array:
    """Returns the L2 norm over the subset, float32 [].

    Args:
      tree: gradients or updates.
      params: θᵗ.
      kept: θ⁰ if `keep_seed`; ignored otherwise.
      state: the state at step t.
    """
    if not state.sparse_seed:
      return reports.norm_of_free(tree, params, kept)
    layout = self.layout(params)
    budget = layout.budgets(self.epsilon)
    return sparse_seed_lib.norm(state.sparse_seed, layout, tree, budget)

  def settle(
    self, tuning: api.Tuning, seed_params: PyTree, step: jax.Array
  ) -> api.Tuning:
    """Projects θ′ with the step's budgets; see `Program.settle`."""
    params, state = self.apply(tuning.params, seed_params, tuning.state, step)
    return tuning._replace(params=params, state=state)

  def apply(
    self,
    new_params: PyTree,
    seed_params: PyTree,
    state: ProjectionState,
    step: jax.Array | None = None,
  ) -> tuple[PyTree, ProjectionState]:
    """Resets all but the farthest components to the seed (Eq. 6, 7).

    Args:
      new_params: θ′, the parameters after the optimizer's step. Values that
        are not finite count as the farthest; `Trainer.train_step` refuses such
        a step.
      seed_params: θ⁰, a tree of the same structure, shapes and dtypes; what
        `seed` returns if not `keep_seed`.
      state: the state that `init` or the last `apply` returned.
      step: int32 [], the number of completed steps; needed if ε changes.

    Returns:
      θᵗ⁺¹ and the next state.

    Raises:
      UserError: ε changes, and there is no step.
    """
    layout, schedule = self.layout(new_params), self.schedule
    if step is None and not schedule.is_constant:
      raise UserError('EPSILON_SCHEDULE: `apply` needs the step')
    budgets = schedule.look_up(schedule.table(layout), step)
    tensors = [tensor.shape for tensor in jax.tree.leaves(new_params)]
    salts = distance_bits.salts(layout, tensors, self.random_seed)
    apply = sharding_types.hide(
      functools.partial(_apply, self), results=(new_params, state)
    )
    return apply(new_params, seed_params, state, budgets, salts)


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=['budgets', 'salts'],
  meta_fields=['method'],
)
@dataclasses.dataclass(frozen=True)
class _Prepared(api.Program):
  """A `SubsetProjection` whose ε and random seed are traced.

  Attributes:
    method: the projection, for its other settings.
    budgets: uint32 [rows, silos, 2], see `schedules.Schedule.table`.
    salts: uint32 [slices], see `distance_bits.salts`.
  """

  widens_seed = True

  method: SubsetProjection
  budgets: Any
  salts: Any

  def init(self, seed_params: PyTree) -> ProjectionState:
    """Returns the state before the first step."""
    return self.method.init(seed_params)

  def settle(
    self, tuning: api.Tuning, seed_params: PyTree, step: jax.Array
  ) -> api.Tuning:
    """Projects θ′ with the step's budgets; see `Program.settle`."""
    params, state = self.apply(tuning.params, seed_params, tuning.state, step)
    return tuning._replace(params=params, state=state)

  def apply(
    self,
    new_params: PyTree,
    seed_params: PyTree,
    state: ProjectionState,
    step: jax.Array | None = None,
  ) -> tuple[PyTree, ProjectionState]:
    """Resets all but the farthest components; see `SubsetProjection.apply`."""
    apply = sharding_types.hide(
      functools.partial(_apply, self.method), results=(new_params, state)
    )
    budgets = self.method.schedule.look_up(self.budgets, step)
    salts = jnp.asarray(self.salts)
    return apply(new_params, seed_params, state, budgets, salts)


def _apply(
  method: SubsetProjection,
  new_params: PyTree,
  seed_params: PyTree,
  state: ProjectionState,
  budgets: Any,
  salts: jax.Array,
) -> tuple[PyTree, ProjectionState]:
  """Returns the projected parameters and the next state."""
  # Without the barrier, XLA may recompute θ′ with different rounding at each
  # use. Counts and masks must see the same values.
  new_params, seed_params = lax.optimization_barrier((new_params, seed_params))
  step = _step(method, budgets, salts, new_params, seed_params, state)
  if state.chosen:
    keep, state = step.kept_without_churn(state)
  else:
    cut, state = step.search(state)
    keep = step.kept(cut)
  if not method.keep_seed:
    free = step.tree.layout.budgets(method.epsilon)
    state = state._replace(sparse_seed=step.sparse_seed(keep, free))
  # A select: p + (s - p) rounds, and does not always equal s.
  return jax.tree.map(_select, keep, new_params, seed_params), state


def _select(keep: jax.Array, new: jax.Array, seed: jax.Array) -> jax.Array:
  return lax.select(keep, new, seed.astype(new.dtype))


def _step(
  method: SubsetProjection,
  budgets: Any,
  salts: jax.Array,
  new_params: PyTree,
  seed_params: PyTree,
  state: ProjectionState,
) -> step_lib.Step:
  """Returns a step with the method's distance and search."""
  layout = method.layout(new_params)
  new, structure = jax.tree.flatten(new_params)
  is_normalized = method.normalization is not None
  of_slices = salts
  if is_normalized:
    groups = silo_lib.make_layout(new_params, method.normalize_over)
    of_slices = normalizations.bits_of_slices(groups, state.scales)
  measure = (
    distance_bits.random
    if method.distance == RANDOM
    else distance_bits.measured(method.distance, is_normalized)
  )
  tree = distance_bits.Tree(
    layout, measure, new, jax.tree.leaves(seed_params), of_slices
  )
  find = step_lib.search(
    method.threshold, layout, method.epsilon, method.delta, method.iterations
  )
  return step_lib.Step(tree, structure, budgets, find)
