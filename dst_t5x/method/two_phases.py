"""Methods that first tune all parameters, and then choose.

Both keep what moved farthest, |θ − θ⁰|. Lottery ticket sparse fine-tuning goes
back to the seed and trains the chosen components again; pruning after training
keeps their values.
"""

import dataclasses
from typing import Any

import jax

from dst_t5x.core import values
from dst_t5x.core.errors import UserError
from dst_t5x.method import api
from dst_t5x.method import reports
from dst_t5x.method import scores
from dst_t5x.method import sparse

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Full(api.Projection):
  """A first phase of full fine-tuning, from a seed that the next one needs.

  Attributes:
    method: the method that this is a phase of.
    rate: a factor of the learning rate.
  """

  method: sparse.Sparse
  rate: float = 1.0

  def settings(self) -> dict[str, Any]:
    """Returns the settings of the whole method."""
    return self.method.settings()

  def free(self, shapes: PyTree) -> int:
    """Returns the budget of the whole method."""
    return self.method.free(shapes)

  def free_at_most(self, shapes: PyTree) -> int:
    """Returns the number of all parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))

  def norm_of_free(
    self, tree: PyTree, params: PyTree, kept: PyTree, state: PyTree
  ) -> jax.Array:
    """Returns the L2 norm over all components, float32 []."""
    del params, kept, state
    return reports.norm_of_free(tree, (), ())

  def apply(
    self, new_params: PyTree, seed_params: PyTree, state: PyTree
  ) -> tuple[PyTree, PyTree]:
    """Returns the parameters and the state unchanged."""
    del seed_params
    return new_params, state


@dataclasses.dataclass(frozen=True)
class LtSft(sparse.Sparse):
  """Lottery ticket sparse fine-tuning (Ansell et al., 2022, arXiv 2110.07560).

  Full fine-tuning; then the parameters go back to θ⁰, and the components that
  moved farthest, of the whole model, are trained with a fresh optimizer.

  So in the authors' code (cambridgeltl/composable-sft), which differs in this:
  A new head is tuned in full and not counted; there is none here. Layer norms
  are frozen, in all their scripts and in both phases; here `exclude` freezes
  them in the second phase, and the first one's changes of them are undone. The
  learning rate's schedule starts again in the second phase; here it goes on.
  Their phases are equally long (100,000 steps for languages, 2 to 5 epochs for
  question answering), but 3 and 10 epochs for parsing.

  Attributes:
    first_steps: the steps of full fine-tuning.
    first_rate: a factor of the learning rate in the first phase. AdaFactor
      needs a far lower rate for all parameters than for a few. The authors,
      with Adam, use one rate.
  """

  first_steps: values.Positive = 500
  first_rate: values.AboveZero = 1.0

  @property
  def phase_starts(self) -> tuple[int, ...]:
    """The steps at which the two phases begin."""
    return (0, self.first_steps)

  def phase(self, number: int) -> api.Projection:
    """Returns full fine-tuning, or this method."""
    return self if number else Full(self, self.first_rate)

  def free_at_most(self, shapes: PyTree) -> int:
    """Returns the number of all parameters: the first phase tunes them."""
    return Full(self).free_at_most(shapes)

  def enter(
    self, params: PyTree, seed_params: PyTree, before: PyTree
  ) -> tuple[PyTree, sparse.SparseState]:
    """Chooses the components that moved farthest, and goes back to θ⁰."""
    del before
    entries = self.of_highest(scores.difference, params, seed_params)
    return seed_params, self.listed(entries, seed_params)


@dataclasses.dataclass(frozen=True)
class PruneAfter(sparse.Sparse):
  """Full fine-tuning, then all but the farthest components are reset.

  The baseline that DST is to be better than: the difference |θ − θ⁰| of a
  tuned model is pruned by magnitude once, after the last step.

  Attributes:
    after: after how many steps to prune. A run that goes on trains the
      components that were kept.
  """

  after: values.Positive | None = None

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.after is None:
      raise UserError(
        'PRUNE_AFTER_STEPS: after how many steps to prune is not set'
      )

  @property
  def phase_starts(self) -> tuple[int, ...]:
    """The step at which all are tuned, and that at which most are reset."""
    return (0, self.after or 1)

  def phase(self, number: int) -> api.Projection:
    """Returns full fine-tuning, or this method."""
    return self if number else Full(self)

  def free_at_most(self, shapes: PyTree) -> int:
    """Returns the number of all parameters."""
    return Full(self).free_at_most(shapes)

  def enter(
    self, params: PyTree, seed_params: PyTree, before: PyTree
  ) -> tuple[PyTree, sparse.SparseState]:
    """Resets all components but those that moved farthest."""
    del before
    frame = self.frame(params)
    entries = self.of_highest(scores.difference, params, seed_params)
    kept = frame.gather(params, entries)
    pruned = frame.scatter(seed_params, entries, kept)
    return pruned, self.listed(entries, seed_params)
