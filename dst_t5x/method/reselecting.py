"""Methods that choose again at intervals and leave what leaves as it is.

In the end more than ε·n parameters can differ from the seed: all that were ever
tuned. They are counted and reported, and the subset's file has them all. θ⁰ is
kept, since the list does not have all that differs from it.
"""

import dataclasses
import math
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from dst_t5x.core import values
from dst_t5x.method import api
from dst_t5x.method import distance_bits
from dst_t5x.method import scores
from dst_t5x.method import shrinking

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Reselecting(shrinking.Shrinking):
  """Tunes a list that is chosen anew at the start of every interval.

  The optimizer's state of a component that stays in the list is kept; that of
  a new one starts at zero.

  Attributes:
    interval: steps between two choices.
  """

  keep_seed = True

  interval: values.Positive = 50

  def free_at_most(self, shapes: PyTree) -> int:
    """Returns the number of all parameters that are not excluded."""
    return self.layout(shapes).included

  def score(self) -> distance_bits.Compute:
    """Returns the score of `scored` and θᵗ."""
    return scores.largest

  def scored(self, params: PyTree, gradients: PyTree) -> PyTree:
    """Returns the first tensors of the score, a tree like the parameters."""
    raise NotImplementedError

  def choose(
    self, tuning: api.Tuning, gradients: PyTree, kept: PyTree, step: jax.Array
  ) -> api.Tuning:
    """Chooses a new list if an interval begins."""

    def anew() -> tuple[PyTree, PyTree]:
      x = self.scored(tuning.params, gradients)
      entries = self.of_highest(
        self.score(),
        x,
        tuning.params,
        budgets=self.budgets(tuning.params, step),
      )
      return self.relisted(tuning, entries, kept)

    def stay() -> tuple[PyTree, PyTree]:
      return tuning.opt_state, tuning.state

    opt_state, state = lax.cond(step % self.interval == 0, anew, stay)
    return tuning._replace(opt_state=opt_state, state=state)


@dataclasses.dataclass(frozen=True)
class Gasdu(Reselecting):
  """GASDU: the largest gradients of each matrix, every `interval` steps.

  "Gauss–Southwell dynamic update" (openreview.net/forum?id=eNLFrvhdEw): the
  components with the largest |g| of one batch are updated, from the same step
  on, until the next choice.

  The authors' code (TaoWang-UGA/GASDU) does this for the four projections of
  self-attention, and gives each the same number of components, so that their
  sum is a share of the whole model (0.1 % by default, 0.01 % in their command);
  here each has the same share of its own. Gradients are rounded to bfloat16
  for the choice; here they are not. Their Adam's moments belong to places in
  the list: what takes a place inherits the moments of what was there. Here
  moments stay with their component, and start at zero.
  """

  silos: Any = 'per_tensor'

  def scored(self, params: PyTree, gradients: PyTree) -> PyTree:
    """Returns the gradients."""
    del params
    return gradients


@dataclasses.dataclass(frozen=True)
class NanoAdam(Reselecting):
  """NanoAdam: the smallest weights (Zhou et al., 2025, arXiv 2506.21374).

  Algorithm 1: at every multiple of the mask interval m, the k components of
  least |θᵗ| are chosen, and updated until the next choice, which needs no
  gradient. The paper's optimizer is Adam; here it is the run's. The algorithm
  also changes k, at every multiple of a density interval; here k is constant.

  Guessed, because we found no code of the optimizer: that k is a share of each
  tensor, and that moments start at zero for components that enter.
  """

  silos: Any = 'per_tensor'

  def score(self) -> distance_bits.Compute:
    """Returns −|θ|."""
    return scores.smallest

  def scored(self, params: PyTree, gradients: PyTree) -> PyTree:
    """Returns the parameters."""
    del gradients
    return params


@dataclasses.dataclass(frozen=True)
class Lift(Reselecting):
  """LIFT: the largest entries of each matrix's low-rank approximation.

  Liu et al., 2025 (arXiv 2506.00772): the "principal weights" are those of
  largest magnitude after a rank reduction by SVD. Tensors that are no matrices
  are scored by their own magnitude, unless they are excluded.

  The authors' code (zihanghliu/LIFT) does this for all linear maps of attention
  and feed-forward layers, and freezes the rest. A matrix has
  (rows + columns)·r components in the list, with LoRA's rank r; here all have
  the same share. After the first choice, their choices come one step earlier
  than here. Moments of components that stay are kept, and those that enter
  start at zero, as here.

  Attributes:
    rank: the rank of the approximation, "filter_rank": 128 by default and as
      recommended, 16 to 128 in the authors' runs. If no side of a matrix is
      longer, this is its own magnitude.
  """

  silos: Any = 'per_tensor'
  rank: values.Positive = 128

  def scored(self, params: PyTree, gradients: PyTree) -> PyTree:
    """Returns the low-rank approximations."""
    del gradients
    layout = self.layout(params)
    leaves, structure = jax.tree.flatten(params)
    found = []
    for leaf, tensor in zip(layout.leaves, leaves, strict=True):
      names = {layout.names[i] for i in leaf.silos}
      is_frozen = names == {'(excluded)'}
      axes = tensor.ndim - int(leaf.stacked)
      found.append(
        tensor if is_frozen or axes < 2 else _low_rank(tensor, axes, self.rank)
      )
    return jax.tree.unflatten(structure, found)


def _low_rank(tensor: jax.Array, axes: int, rank: int) -> jax.Array:
  """Returns the best approximation of a rank, float32 of the same shape.

  Args:
    tensor: a matrix, or a stack of matrices; the last axes form the columns.
    axes: how many axes a matrix has.
    rank: the rank.
  """
  stack = tensor.shape[: tensor.ndim - axes]
  rows = tensor.shape[tensor.ndim - axes]
  columns = math.prod(tensor.shape[tensor.ndim - axes + 1 :])
  matrix = tensor.astype(jnp.float32).reshape(*stack, rows, columns)
  u, s, v = jnp.linalg.svd(matrix, full_matrices=False)
  r = min(rank, s.shape[-1])
  low = (u[..., :r] * s[..., None, :r]) @ v[..., :r, :]
  return low.reshape(tensor.shape)
