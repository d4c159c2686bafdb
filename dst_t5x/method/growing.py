"""ID3: a subset that grows step by step."""

from collections.abc import Sequence
import dataclasses
import functools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from dst_t5x.core import values
from dst_t5x.method import api
from dst_t5x.method import distance_bits
from dst_t5x.method import entries as entries_lib
from dst_t5x.method import scores
from dst_t5x.method import selection
from dst_t5x.method import sharding_types
from dst_t5x.method import sparse

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Id3(sparse.Sparse):
  """ID3: incremental selection by gradient over magnitude (TACL 2025).

  Agarwal et al. (arXiv 2408.14470), Algorithm 1 with the uniform schedule: in
  each step, the components of highest |g| / (|θ| + smoothing)^exponent among
  those that were not chosen yet are added to the list, in the whole model.
  What was chosen stays. The budget is reached after `grow_steps` steps and
  never exceeded.

  After step t the list has ⌊B·t/T⌋ components. The authors' code
  (Aradhye2002/selective-peft-toolkit) adds ⌊B/T⌋ in each step, and one more in
  the first B mod T steps.

  Attributes:
    grow_steps: T, the steps in which the list grows; in the paper, all of the
      training.
    smoothing: ε of D³, the paper's heuristic. The paper tries 1e-3 to 1 and
      does best with 0.1 and 1.
    exponent: `exp` of D³. With 0 only gradients count. The paper tries −2, −1,
      1 and 2, and does best with 1 and 2.
  """

  grow_steps: values.Positive = 500
  smoothing: values.AboveZero = 1.0
  exponent: float = 1.0

  def choose(
    self, tuning: api.Tuning, gradients: PyTree, kept: PyTree, step: jax.Array
  ) -> api.Tuning:
    """Adds the step's share of components to the list."""
    frame = self.frame(tuning.params)
    wanted = _share(frame.rooms, step, self.grow_steps)

    def grow() -> tuple[PyTree, PyTree]:
      grown = sharding_types.hide(self._grown)(
        tuning.state.entries, tuning.params, gradients, wanted
      )
      return self.relisted(tuning, grown, kept)

    def stay() -> tuple[PyTree, PyTree]:
      return tuning.opt_state, tuning.state

    opt_state, state = lax.cond(step < self.grow_steps, grow, stay)
    return tuning._replace(opt_state=opt_state, state=state)

  def _grown(
    self,
    before: entries_lib.Entries,
    params: PyTree,
    gradients: PyTree,
    wanted: jax.Array,
  ) -> entries_lib.Entries:
    frame, layout = self.frame(params), self.layout(params)
    # A component that is listed has no gradient in the score.
    others = frame.scatter(gradients, before, jnp.zeros(frame.room))
    listed = frame.counts_of_silos(before)
    more = jnp.maximum(wanted, listed) - listed
    budgets = jnp.stack([jnp.zeros_like(more), more], axis=1)
    new = selection.choose(
      layout,
      _d3(self.smoothing, self.exponent),
      others,
      params,
      budgets.astype(jnp.uint32),
    )
    both = jax.tree.map(jnp.logical_or, new, frame.masks(before, params))
    return frame.of_masks(both)


def _share(rooms: Sequence[int], step: jax.Array, steps: int) -> jax.Array:
  """Returns the share of each room after a step, rounded down, int32 [silos].

  Args:
    rooms: [silos], the budgets.
    step: int32 [], the number of completed steps before the step.
    steps: after how many steps the whole budget is reached.
  """
  with jax.enable_x64(True):
    done = jnp.minimum(step + 1, steps).astype(jnp.uint64)
    share = jnp.asarray(rooms, jnp.uint64) * done // jnp.uint64(steps)
    return share.astype(jnp.int32)


@functools.cache
def _d3(smoothing: float, exponent: float) -> distance_bits.Compute:
  """Returns the score |g| / (|θ| + smoothing)^exponent."""

  def score(
    gradient: jax.Array,
    param: jax.Array,
    position: jax.Array,
    number: jax.Array,
  ) -> jax.Array:
    magnitude = jnp.abs(param.astype(jnp.float32)) + smoothing
    ratio = gradient.astype(jnp.float32) / magnitude**exponent
    return scores.largest(ratio, param, position, number)

  return score
