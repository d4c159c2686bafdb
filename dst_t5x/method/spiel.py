"""SpIEL: a subset that drops what moved least and grows by gradient.

SpIEL-AG, "accumulated gradients" (Ansell et al., 2024, arXiv 2401.16405). What
the paper leaves open follows the authors' code, `SftSelector` in
github.com/AlanAnsell/peft at 73b455b; names in quotes are its settings.
"""

import dataclasses
import math
from typing import Any, Literal, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from dst_t5x.core import values
from dst_t5x.core.errors import UserError
from dst_t5x.method import api
from dst_t5x.method import distance_bits
from dst_t5x.method import entries as entries_lib
from dst_t5x.method import entry_keys
from dst_t5x.method import scores
from dst_t5x.method import shrinking
from dst_t5x.method import sparse

PyTree = Any


class Candidates(NamedTuple):
  """The components that may enter the list, as many as the list has.

  Attributes:
    entries: the candidates; none outside of a window.
    sums: float32 [room], the sums of their gradients.
  """

  entries: entries_lib.Entries
  sums: jax.Array


@dataclasses.dataclass(frozen=True)
class Spiel(shrinking.Shrinking):
  """SpIEL-AG: every `interval` steps, a share of the list is replaced.

  With S = `interval` and γ = `accumulate`, counting steps from 1:

  - The first list is random.
  - A window of steps begins at step 1, and at every multiple of S. The
    gradients of its first step choose candidates, as many as the silo's first
    budget and of any component: those of largest |g|. Their gradients are added
    up until the window ends, after step γ, and γ steps after every multiple of
    S. So the first window has γ steps, and later ones γ + 1.
  - When a window ends, after the optimizer's step, the share p of each silo's
    list is to drop: the components of smallest |θ − θ⁰|. As many candidates
    that are not to stay enter it: those of largest |sum|. A component that
    would both drop and enter keeps its value. If there are fewer candidates
    than places, those that moved least make room for them.
  - p is 1 in the first window, and then `share`·(1 − t/`steps`) after step t.
    With the cosine it is `share`·(1 + cos(π·t/`steps`))/2, in the first window
    too. Nothing is replaced after `steps`.
  - If the budget shrinks, what exceeds the budget of the window's last step
    leaves, too: again the components of smallest |θ − θ⁰|. The share p is of
    the budget.

  A component that leaves is reset to θ⁰ bit for bit; one that enters starts
  there. The state has lists only.

  Differences from the authors' code: The optimizer's state of components that
  enter starts at zero; the authors' Adam starts from the mean gradient and mean
  squared gradient of the window, with a step count for each component. A window
  adds up the gradients of steps, not of microbatches. Silos and exclusions can
  be chosen; the authors' budgets are per tensor, for all linear maps of
  attention and feed-forward layers, but a share of the whole model's size.

  Attributes:
    interval: S, "reselection_steps".
    accumulate: γ, "selection_accumulation_steps"; less than S.
    share: "initial_reselection_rate".
    steps: the steps after which p is zero: the length of the training.
    decay: `linear` or `cosine`, "reselection_rate_policy".
    random_seed: the seed of the first list.

  Raises:
    UserError: a value is out of range, `steps` is not set, or the budget would
      still shrink after the last window.
  """

  silos: Any = 'per_tensor'
  interval: values.Positive = 20
  accumulate: values.Positive = 5
  share: values.Share = 0.2
  steps: values.Positive | None = None
  decay: Literal['linear', 'cosine'] = 'linear'
  random_seed: values.RandomSeed = 0

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.steps is None:
      raise UserError('SPIEL_STEPS: the length of the training is not set')
    if self.accumulate >= self.interval:
      raise UserError(
        f'SPIEL_ACCUMULATE = {self.accumulate} must be less than INTERVAL = '
        f'{self.interval}'
      )
    if not self.schedule.is_constant:
      self._check_that_it_ends()

  def _check_that_it_ends(self) -> None:
    """Raises UserError if no window ends with the last ε."""
    *_, last = self._ends
    if self.schedule.epsilon(last) != self.epsilon:
      raise UserError(
        f'EPSILON_STEPS = {self.epsilon_steps}: with SPIEL_STEPS = '
        f'{self.steps}, INTERVAL = {self.interval} and SPIEL_ACCUMULATE = '
        f'{self.accumulate}, the subset changes for the last time after step '
        f'{last}; set EPSILON_STEPS = {last} or less'
      )

  def init(self, seed_params: PyTree) -> sparse.SparseState:
    """Returns the state with a random list and no candidates."""
    shapes = [tensor.shape for tensor in jax.tree.leaves(seed_params)]
    layout = self.layout(seed_params)
    salts = distance_bits.salts(layout, shapes, self.random_seed)
    entries = self.of_highest(
      distance_bits.random, seed_params, seed_params, salts
    )
    nothing = self._no_candidates(self.frame(seed_params))
    return self.listed(entries, seed_params, extra=nothing)

  def choose(
    self, tuning: api.Tuning, gradients: PyTree, kept: PyTree, step: jax.Array
  ) -> api.Tuning:
    """Chooses candidates, or adds up their gradients; the list stays."""
    del kept
    before = tuning.state.extra
    phase = (step + 1) % self.interval
    begins = (step == 0) | (phase == 0)
    # A window whose first steps were refused begins later.
    begins |= (phase <= self.accumulate) & (before.entries.counts.sum() == 0)

    def begin() -> Candidates:
      entries = self.of_highest(scores.largest, gradients, gradients)
      return Candidates(
        entries, self.frame(gradients).gather(gradients, entries)
      )

    def add() -> Candidates:
      more = self.frame(gradients).gather(gradients, before.entries)
      return before._replace(sums=before.sums + more)

    def otherwise() -> Candidates:
      # After a refused step, candidates can be left when a window ends.
      nothing = self._no_candidates(self.frame(gradients))
      return lax.cond(phase <= self.accumulate, add, lambda: nothing)

    extra = lax.cond(begins, begin, otherwise)
    return tuning._replace(state=tuning.state._replace(extra=extra))

  def settle(
    self, tuning: api.Tuning, seed_params: PyTree, step: jax.Array
  ) -> api.Tuning:
    """Replaces a share of the list if a window ends."""
    del seed_params
    frame = self.frame(tuning.params)
    ends = ((step + 1) % self.interval == self.accumulate) & (
      step < (self.steps or 0)
    )
    nothing = (frame.empty(), jnp.zeros(frame.room), *tuning[1:])
    reset, seed_values, opt_state, state = lax.cond(
      ends,
      lambda: self._replaced(tuning, step),
      lambda: nothing,
    )
    # Outside of the condition, which could copy all parameters.
    params = frame.scatter(tuning.params, reset, seed_values)
    return api.Tuning(params, opt_state, state)

  def _replaced(
    self, tuning: api.Tuning, step: jax.Array
  ) -> tuple[entries_lib.Entries, jax.Array, PyTree, sparse.SparseState]:
    """Replaces the share of a window.

    Args:
      tuning: the parameters and states after the optimizer's step.
      step: int32 [], the number of completed steps before the step.

    Returns:
      A list and the values that its components are to have, float32 [room],
      which resets those that leave; the optimizer's next state; the next state.
    """
    frame, state = self.frame(tuning.params), tuning.state
    before, candidates = state.entries, state.extra
    current = frame.gather(tuning.params, before)
    moved = current - state.seed_values
    listed = frame.counts_of_silos(before)
    kept = self._kept(listed, tuning.params, step)
    places = self._places(kept, step // self.interval)
    leaves, enters = _exchange(
      frame, before, moved, candidates, places, listed - kept
    )
    after = entry_keys.joined(
      frame, before, ~leaves, candidates.entries, enters
    )
    # A component that enters is at its seed value.
    index, stays = entry_keys.match(frame, after, before)
    seed_values = jnp.where(
      stays, state.seed_values[index], frame.gather(tuning.params, after)
    )
    return (
      before,
      jnp.where(leaves, state.seed_values, current),
      entry_keys.carried(frame, tuning.opt_state, before, after),
      sparse.SparseState(after, seed_values, self._no_candidates(frame)),
    )

  def _kept(self, listed: jax.Array, params: PyTree, step: Any) -> jax.Array:
    """Returns how many entries each silo is to have, int32 [silos]."""
    if self.schedule.is_constant:
      return listed
    budgets = self.budgets(params, step)[:, 1]  # Lists are below 2³².
    return jnp.minimum(listed, budgets.astype(jnp.int32))

  def _places(self, kept: jax.Array, window: Any) -> jax.Array:
    """Returns how many of each silo's entries to replace, int32 [silos].

    The product p·n is exact up to p's rounding to 32 bits, and rounded down.
    """
    with jax.enable_x64(True):
      shares = jnp.array(self._shares(), jnp.uint64)
      n = kept.astype(jnp.uint64)
      return (n * shares[window] >> 32).astype(jnp.int32)

  @property
  def _ends(self) -> range:
    """The last steps of all windows, counted from 1."""
    last = max(self.steps or 0, self.accumulate)
    return range(self.accumulate, last + 1, self.interval)

  def _shares(self) -> list[int]:
    """Returns p of each window, in units of 2⁻³², rounded up."""
    total = self.steps or 0
    if self.decay == 'cosine':
      shares = [(1 + math.cos(math.pi * t / total)) / 2 for t in self._ends]
    else:
      shares = [1 - t / total for t in self._ends]
    shares = [self.share * share for share in shares]
    if self.decay == 'linear':
      shares[0] = 1
    return [max(0, math.ceil(share * 2**32)) for share in shares]

  def _no_candidates(self, frame: entries_lib.Frame) -> Candidates:
    return Candidates(frame.empty(), jnp.zeros(frame.room, jnp.float32))


def _exchange(
  frame: entries_lib.Frame,
  before: entries_lib.Entries,
  moved: jax.Array,
  candidates: Candidates,
  places: jax.Array,
  surplus: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Returns which entries leave the list, and which candidates enter it.

  Args:
    frame: the frame of the list and of the candidates.
    before: the list.
    moved: float32 [room], θ − θ⁰ of its entries.
    candidates: the candidates.
    places: int32 [silos], how many entries to replace.
    surplus: int32 [silos], how many entries leave besides.

  Returns:
    Two masks, bool [room]; in each silo, the first has `surplus` entries more.
  """
  silo = frame.silo_of_entry
  used = frame.is_used(before)
  least = scores.bits(moved)
  rank = entry_keys.ranks(frame, least, used)
  drops = used & (rank < (places + surplus)[silo])
  index, is_listed = entry_keys.match(frame, candidates.entries, before)
  can_enter = frame.is_used(candidates.entries) & (~is_listed | drops[index])
  most = jnp.uint32(scores.INFINITY) - scores.bits(candidates.sums)
  grows = can_enter & (entry_keys.ranks(frame, most, can_enter) < places[silo])
  returns = jnp.where(grows & is_listed, index, frame.room)
  drops = drops & ~jnp.zeros_like(drops).at[returns].set(True, mode='drop')
  enters = grows & ~is_listed
  leaving = surplus.at[silo].add(enters)
  leaves = drops & (entry_keys.ranks(frame, least, drops) < leaving[silo])
  return leaves, enters
