"""The method contract: what happens to parameters after the optimizer's step.

Training, evaluation, resumption, budgets, reports and T5X use nothing else of a
method. A method of your own is a frozen dataclass that subclasses `Projection`
and has `free` and `apply`; the defaults of all else suit a method that has no
state. Here one that tunes the first rows of each tensor:

>>> import dataclasses, math
>>> import jax.numpy as jnp
>>> @dataclasses.dataclass(frozen=True)
... class FirstRows(Projection):
...   rows: int
...   def free(self, shapes):
...     return sum(
...         min(self.rows, x.shape[0]) * math.prod(x.shape[1:])
...         for x in jax.tree.leaves(shapes))
...   def apply(self, new_params, seed_params, state):
...     def select(new, seed):
...       row = jnp.arange(len(new)).reshape(-1, *[1] * (new.ndim - 1))
...       return jnp.where(row < self.rows, new, seed)
...     return jax.tree.map(select, new_params, seed_params), state
>>> method = FirstRows(rows=2)
>>> method.settings()
{'method': 'first_rows', 'rows': 2}
>>> seed = {'kernel': jnp.zeros((3, 4))}
>>> method.free(seed)
8
>>> params, _ = method.apply({'kernel': jnp.ones((3, 4))}, seed, ())
>>> int(params['kernel'].sum())
8
"""

import dataclasses
from typing import Any

import jax

from dst_t5x.core import json_text
from dst_t5x.core import stable_ids
from dst_t5x.method import reports
from dst_t5x.method import silos

PyTree = Any


class Program:
  """What a compiled step calls of a method. Its functions can be traced.

  A pytree whose leaves are the numbers that may change without a new
  compilation.

  Attributes:
    constrains: whether parameters are tied to a seed, so that one is needed.
    keep_seed: whether θ⁰ must be at hand in each step.
  """

  constrains = True
  keep_seed = True

  def init(self, seed_params: PyTree) -> PyTree:
    """Returns the state before the first step, a pytree of arrays.

    Args:
      seed_params: θ⁰, of what is trained.
    """
    del seed_params
    return ()

  def seed(self, params: PyTree, kept: PyTree, state: PyTree) -> PyTree:
    """Returns θ⁰: what was kept, or else rebuilt from θᵗ bit for bit.

    Args:
      params: θᵗ.
      kept: θ⁰ if `keep_seed`, else anything.
      state: that goes with θᵗ.
    """
    del params, state
    return kept

  def norm_of_free(
    self, tree: PyTree, params: PyTree, kept: PyTree, state: PyTree
  ) -> jax.Array:
    """Returns the L2 norm, float32 [], over the components that are free.

    Args:
      tree: gradients or updates.
      params: θᵗ; a component is free if it differs from the seed.
      kept: θ⁰ if `keep_seed`, else anything.
      state: that goes with θᵗ.
    """
    del state
    return reports.norm_of_free(tree, params, kept)

  def apply(
    self, new_params: PyTree, seed_params: PyTree, state: PyTree
  ) -> tuple[PyTree, PyTree]:
    """Projects the parameters after an optimizer's step.

    A component that is reset must get the seed's bits, by a select. An added
    difference, p + (s - p), misses them.

    Args:
      new_params: θ′, the parameters after the optimizer's step.
      seed_params: θ⁰, a tree of the same structure, shapes and dtypes.
      state: what `init` or the last `apply` returned.

    Returns:
      θᵗ⁺¹ and the next state.
    """
    raise NotImplementedError


class Projection(Program):
  """A method and its settings, hashable and compared by value.

  It is a `Program` itself, all of whose settings are constants of the compiled
  step.
  """

  def __init_subclass__(cls, **options: Any) -> None:
    """Registers each method as a pytree without leaves."""
    super().__init_subclass__(**options)
    jax.tree_util.register_static(cls)

  def prepare(self, shapes: PyTree) -> Program:
    """Returns what a step calls, with its numbers as leaves.

    Methods whose programs have the same structure share a compiled step.

    Args:
      shapes: of what is trained, or the parameters.
    """
    del shapes
    return self

  def settings(self) -> dict[str, Any]:
    """Returns the method's name, `method`, and its settings, as JSON.

    They tell a run from another: the names must not change. By default the
    class's name in snake case, and the fields of the dataclass.
    """
    name = stable_ids.stable_id(type(self))
    this: Any = self
    fields = dataclasses.fields(this) if dataclasses.is_dataclass(this) else ()
    values = {field.name: getattr(this, field.name) for field in fields}
    return {'method': name} | json_text.plain(values)

  def free(self, shapes: PyTree) -> int:
    """Returns how many parameters are free, the method's budget.

    Args:
      shapes: of what is trained, or the parameters.
    """
    raise NotImplementedError

  def table(self, shapes: PyTree) -> str:
    """Returns the budget's parts, as text for the log; '' if it has none.

    Args:
      shapes: of what is trained, or the parameters.

    Raises:
      UserError: the settings do not fit the parameters.
    """
    del shapes
    return ''

  def scalars(self, shapes: PyTree, state: PyTree) -> dict[str, float]:
    """Returns what is logged of a state: TensorBoard's tag -> value.

    Args:
      shapes: of what is trained, or the parameters.
      state: that `apply` returned.
    """
    del shapes, state
    return {}

  def may_have_made(self, params: PyTree, seed_params: PyTree) -> bool:
    """Returns whether parameters can be the method's from this seed.

    By default, whether no more components differ from the seed than are free.
    A seed that belongs to other parameters differs from them nearly everywhere.

    Args:
      params: θᵗ.
      seed_params: θ⁰.
    """
    layout = silos.make_layout(params, 'per_tensor')
    free = reports.count_free(layout, params, seed_params)
    return int(free.sum()) <= self.free(params)
