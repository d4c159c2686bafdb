"""The base of methods that tune a list of components.

Such a method differs from others of the family in three choices: the score by
which components are chosen, when they are chosen, and what becomes of one that
leaves the list. Everything else is here. The optimizer sees one vector for each
silo, the listed components of that silo, so its state has ε·n entries.
AdaFactor therefore scales and clips an update by the root mean square over the
silo's listed components, instead of over a whole tensor.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dst_t5x.core import json_text
from dst_t5x.core import stable_ids
from dst_t5x.core import values
from dst_t5x.method import api
from dst_t5x.method import entries as entries_lib
from dst_t5x.method import entry_keys
from dst_t5x.method import reports
from dst_t5x.method import selection
from dst_t5x.method import sharding_types
from dst_t5x.method import silos as silo_lib
from dst_t5x.method.entries import Entries

PyTree = Any


class SparseState(NamedTuple):
  """The state of a method that tunes a list.

  Attributes:
    entries: the list.
    seed_values: float32 [room], θ⁰ of the listed components; () if the step
      keeps all of θ⁰.
    extra: what a method needs besides, such as sums of gradients.
  """

  entries: Entries
  seed_values: Any = ()
  extra: Any = ()


@dataclasses.dataclass(frozen=True)
class Sparse(api.Projection):
  """Tunes a list of ε·|S| components of every silo S.

  Subclasses define when the list is chosen: in `init`, `enter`, `choose` or
  `settle`. The copy of θ⁰ is not needed, because the list has the seed values
  of all components that differ.

  Attributes:
    epsilon: ε in (0, 1], the share of parameters that are listed.
    silos: a name in `silos.SILOS`, or rules; see `silos.named`.
    exclude: regular expressions for the paths of frozen tensors. The budget is
      a share of the other tensors.

  Raises:
    UserError: a value is out of range or unknown.
  """

  keep_seed = False
  acts_after_step = False

  epsilon: values.Share
  silos: silo_lib.Silos = 'none'
  exclude: Sequence[str] = ()

  def __post_init__(self) -> None:
    values.check_fields(self)
    object.__setattr__(self, 'silos', silo_lib.checked(self.silos))
    object.__setattr__(self, 'exclude', tuple(self.exclude))

  def layout(self, params: PyTree) -> silo_lib.Layout:
    """Returns the partition of `params` into silos."""
    return silo_lib.make_layout(params, self.silos, self.exclude)

  def frame(self, params: PyTree) -> entries_lib.Frame:
    """Returns what is fixed about the lists for these parameters."""
    layout = self.layout(params)
    return entries_lib.frame(layout, params, layout.budgets(self.largest))

  @property
  def largest(self) -> float:
    """The largest ε of the run, for which the list has room."""
    return self.epsilon

  def settings(self) -> dict[str, Any]:
    """Returns the method's name and its settings."""
    name = stable_ids.stable_id(type(self))
    return {'method': name} | json_text.plain(dataclasses.asdict(self))

  def free(self, shapes: PyTree) -> int:
    """Returns the number of listed parameters, the sum of all budgets."""
    return sum(self.layout(shapes).budgets(self.epsilon))

  def table(self, shapes: PyTree) -> str:
    """Returns a text table of the budget of each silo."""
    layout = self.layout(shapes)
    return layout.share_of_included(self.epsilon) + layout.table(self.epsilon)

  def may_have_made(self, params: PyTree, seed_params: PyTree) -> bool:
    """Returns whether each silo's free components are within its budget."""
    layout = self.layout(params)
    free = reports.count_free(layout, params, seed_params)
    if self.free_at_most(params) > self.free(params):
      return int(free.sum()) <= self.free_at_most(params)
    return bool((free <= np.array(layout.budgets(self.epsilon))).all())

  def init(self, seed_params: PyTree) -> SparseState:
    """Returns a state with an empty list."""
    return self.listed(self.frame(seed_params).empty(), seed_params)

  def listed(
    self, entries: Entries, seed_params: PyTree, extra: Any = ()
  ) -> SparseState:
    """Returns the state with a list."""
    seed_values: Any = ()
    if not self.keep_seed:
      seed_values = self.frame(seed_params).gather(seed_params, entries)
    return SparseState(entries, seed_values, extra)

  def of_highest(
    self,
    score: Any,
    x: PyTree,
    y: PyTree,
    numbers: jax.Array | None = None,
    budgets: Any = None,
  ) -> Entries:
    """Returns the list of the components with the highest scores.

    Args:
      score: a `distance_bits.Compute`.
      x: its first tensors, like the parameters.
      y: its second tensors.
      numbers: uint32 [slices], its numbers; zeros if None.
      budgets: see `selection.choose`; the rooms of the list if None.
    """

    def choose(
      x: PyTree, y: PyTree, numbers: jax.Array | None, budgets: Any
    ) -> Entries:
      frame = self.frame(x)
      most = frame.rooms if budgets is None else budgets
      return frame.of_masks(
        selection.choose(self.layout(x), score, x, y, most, numbers)
      )

    return sharding_types.hide(choose)(x, y, numbers, budgets)

  def seed(self, params: PyTree, kept: PyTree, state: SparseState) -> PyTree:
    """Returns θ⁰: the kept copy, or θᵗ with the list's seed values."""
    if self.keep_seed:
      return kept
    frame = self.frame(params)
    return frame.scatter(params, state.entries, state.seed_values)

  def norm_of_free(
    self, tree: PyTree, params: PyTree, kept: PyTree, state: SparseState
  ) -> jax.Array:
    """Returns the L2 norm over the listed components, float32 []."""
    del params, kept, state
    return reports.norm_of_free(tree, (), ())

  def tuned(self, tree: PyTree, state: SparseState) -> dict[str, jax.Array]:
    """Returns each silo's listed components, float32 [room of the silo]."""
    frame = self.frame(tree)
    return frame.split(frame.gather(tree, state.entries))

  def put(
    self, params: PyTree, tuned: dict[str, jax.Array], state: SparseState
  ) -> PyTree:
    """Returns the parameters with the listed components replaced."""
    frame = self.frame(params)
    return frame.scatter(params, state.entries, frame.join(tuned))

  def settle(
    self, tuning: api.Tuning, seed_params: PyTree, step: jax.Array
  ) -> api.Tuning:
    """Returns what it is given: only listed components have changed."""
    del seed_params, step
    return tuning

  def relisted(
    self, tuning: api.Tuning, after: Entries, kept: PyTree
  ) -> tuple[PyTree, SparseState]:
    """Returns the optimizer's state and the method's for a new list.

    Args:
      tuning: parameters, and the states of the list before.
      after: the new list.
      kept: θ⁰ if `keep_seed`; ignored otherwise.
    """
    frame, before = self.frame(tuning.params), tuning.state
    opt_state = entry_keys.carried(
      frame, tuning.opt_state, before.entries, after
    )
    if self.keep_seed:
      return opt_state, before._replace(entries=after)
    seed = self.seed(tuning.params, kept, before)
    seed_values = frame.gather(seed, after)
    return opt_state, before._replace(entries=after, seed_values=seed_values)


def zeros_like(params: PyTree) -> PyTree:
  """Returns sums of gradients before the first: float32 zeros."""
  return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params)
