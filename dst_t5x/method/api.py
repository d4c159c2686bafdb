"""The method contract: what happens to parameters after the optimizer's step.

Training, evaluation, resumption, budgets, reports and T5X use a method only
through this interface. To add a method, write a frozen dataclass that
subclasses `Projection` and defines `free` and `apply`. The other defaults suit
a method without state. This example tunes the first rows of each tensor:

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
  """The part of a method that a compiled step calls.

  All its functions can be traced by JAX. A program is a pytree. Its leaves are
  the values that can change without recompilation.

  Attributes:
    constrains: whether the method ties the parameters to a seed, and so needs
      one.
    keep_seed: whether each step needs a copy of θ⁰.
  """

  constrains = True
  keep_seed = True

  def init(self, seed_params: PyTree) -> PyTree:
    """Returns the state before the first step, a pytree of arrays.

    Args:
      seed_params: θ⁰ of the trained parameters.
    """
    del seed_params
    return ()

  def seed(self, params: PyTree, kept: PyTree, state: PyTree) -> PyTree:
    """Returns θ⁰: the kept copy, or θ⁰ rebuilt bit for bit from θᵗ.

    Args:
      params: θᵗ.
      kept: θ⁰ if `keep_seed`; ignored otherwise.
      state: the method's state at step t.
    """
    del params, state
    return kept

  def norm_of_free(
    self, tree: PyTree, params: PyTree, kept: PyTree, state: PyTree
  ) -> jax.Array:
    """Returns the L2 norm over the free components, float32 [].

    Args:
      tree: gradients or updates.
      params: θᵗ; a component is free if it differs from the seed.
      kept: θ⁰ if `keep_seed`; ignored otherwise.
      state: the method's state at step t.
    """
    del state
    return reports.norm_of_free(tree, params, kept)

  def apply(
    self, new_params: PyTree, seed_params: PyTree, state: PyTree
  ) -> tuple[PyTree, PyTree]:
    """Projects the parameters after the optimizer's step.

    A component that is reset must equal the seed bit for bit. Use a select:
    p + (s - p) rounds, and does not always equal s.

    Args:
      new_params: θ′, the parameters after the optimizer's step.
      seed_params: θ⁰, a tree of the same structure, shapes and dtypes.
      state: the state that `init` or the last `apply` returned.

    Returns:
      θᵗ⁺¹ and the next state.
    """
    raise NotImplementedError


class Projection(Program):
  """A method and its settings, hashable and compared by value.

  By default a projection is its own `Program`, and its settings are constants
  of the compiled step.
  """

  def __init_subclass__(cls, **options: Any) -> None:
    """Registers each method as a pytree without leaves."""
    super().__init_subclass__(**options)
    jax.tree_util.register_static(cls)

  def prepare(self, shapes: PyTree) -> Program:
    """Returns the program that a step calls.

    Methods whose programs have the same tree structure share a compiled step.

    Args:
      shapes: the trained parameters, or their shapes.
    """
    del shapes
    return self

  def settings(self) -> dict[str, Any]:
    """Returns the settings that identify the method in `run.json`.

    `method` is the method's name, by default the class's name in snake case.
    The other entries are the dataclass's fields, as JSON values. Names must not
    change: a run resumes only with the settings that it was started with.
    """
    name = stable_ids.stable_id(type(self))
    this: Any = self
    fields = dataclasses.fields(this) if dataclasses.is_dataclass(this) else ()
    values = {field.name: getattr(this, field.name) for field in fields}
    return {'method': name} | json_text.plain(values)

  def free(self, shapes: PyTree) -> int:
    """Returns the method's budget: how many parameters are free.

    Args:
      shapes: the trained parameters, or their shapes.
    """
    raise NotImplementedError

  def table(self, shapes: PyTree) -> str:
    """Returns a table of the budget's parts for the log; '' if it has none.

    Args:
      shapes: the trained parameters, or their shapes.

    Raises:
      UserError: the settings do not fit the parameters.
    """
    del shapes
    return ''

  def scalars(self, shapes: PyTree, state: PyTree) -> dict[str, float]:
    """Returns the scalars to log for a state, by TensorBoard tag.

    Args:
      shapes: the trained parameters, or their shapes.
      state: a state that `apply` returned.
    """
    del shapes, state
    return {}

  def may_have_made(self, params: PyTree, seed_params: PyTree) -> bool:
    """Returns whether the method can have made these parameters from this seed.

    The default checks that at most `free` components differ from the seed. The
    wrong seed differs from the parameters in nearly every component.

    Args:
      params: θᵗ.
      seed_params: θ⁰.
    """
    layout = silos.make_layout(params, 'per_tensor')
    free = reports.count_free(layout, params, seed_params)
    return int(free.sum()) <= self.free(params)
