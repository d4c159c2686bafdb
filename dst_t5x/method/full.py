"""Full fine-tuning and pretraining."""

import dataclasses
from typing import Any

import jax

from dst_t5x.method import api
from dst_t5x.method import reports

PyTree = Any


@dataclasses.dataclass(frozen=True)
class NoProjection(api.Projection):
  """Full fine-tuning and pretraining: every parameter is free."""

  constrains = False
  keep_seed = False

  def settings(self) -> dict[str, Any]:
    """Returns the method's name."""
    return {'method': 'full'}

  def free(self, shapes: PyTree) -> int:
    """Returns the number of all parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))

  def norm_of_free(
    self, tree: PyTree, params: PyTree, kept: PyTree, state: tuple[()]
  ) -> jax.Array:
    """Returns the L2 norm over all components, float32 []."""
    del kept, state
    return reports.norm_of_free(tree, params, ())

  def apply(
    self, new_params: PyTree, seed_params: PyTree, state: tuple[()]
  ) -> tuple[PyTree, tuple[()]]:
    """Returns the parameters and the state unchanged."""
    del seed_params
    return new_params, state
