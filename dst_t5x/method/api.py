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

from collections.abc import Sequence
import dataclasses
from typing import Any, NamedTuple

import jax

from dst_t5x.core import json_text
from dst_t5x.core import stable_ids
from dst_t5x.method import reports
from dst_t5x.method import silos

PyTree = Any


class Tuning(NamedTuple):
  """The part of a training state that a method may change.

  Attributes:
    params: θᵗ, or θ′ after the optimizer's step.
    opt_state: the optimizer's state for the tree that `Program.tuned` returns.
    state: the method's state.
  """

  params: PyTree
  opt_state: PyTree
  state: PyTree


class Program:
  """The part of a method that a compiled step calls.

  All its functions can be traced by JAX. A program is a pytree. Its leaves are
  the values that can change without recompilation.

  A step calls `choose`, then the optimizer with what `tuned` returns, then
  `put` and `settle`. By default the optimizer sees whole parameters, and
  `settle` calls `apply`, which is all that most methods define.

  Attributes:
    constrains: whether the method ties the parameters to a seed, and so needs
      one.
    keep_seed: whether each step needs a copy of θ⁰.
    acts_after_step: whether the method acts through `apply` and `settle` only,
      so that the optimizer sees whole parameters.
    widens_seed: whether the functions accept θ⁰ in bfloat16 beside parameters
      in float32, and convert it where they use it. Others get it converted,
      which takes the memory of a copy.
    rate: a factor of the learning rate.
  """

  constrains = True
  keep_seed = True
  acts_after_step = True
  widens_seed = False
  rate: float = 1.0

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
      tree: gradients or updates, as `tuned` returns them.
      params: θᵗ; a component is free if it differs from the seed.
      kept: θ⁰ if `keep_seed`; ignored otherwise.
      state: the method's state at step t.
    """
    del state
    return reports.norm_of_free(tree, params, kept)

  def enter(
    self, params: PyTree, seed_params: PyTree, before: PyTree
  ) -> tuple[PyTree, PyTree]:
    """Begins a phase of a method that has several; see `Projection.phase`.

    Args:
      params: the parameters at the end of the phase before.
      seed_params: θ⁰.
      before: the state at the end of the phase before.

    Returns:
      The parameters and the state with which the phase begins.
    """
    del seed_params, before
    return params, self.init(params)

  def choose(
    self, tuning: Tuning, gradients: PyTree, kept: PyTree, step: jax.Array
  ) -> Tuning:
    """Chooses what the optimizer's step will tune.

    Args:
      tuning: parameters and states at step t; the parameters must not change.
      gradients: the gradients at θᵗ.
      kept: θ⁰ if `keep_seed`; ignored otherwise.
      step: int32 [], t.
    """
    del gradients, kept, step
    return tuning

  def tuned(self, tree: PyTree, state: PyTree) -> PyTree:
    """Returns the part of a tree that the optimizer sees.

    Args:
      tree: a tree like the parameters.
      state: the method's state.
    """
    del state
    return tree

  def put(self, params: PyTree, tuned: PyTree, state: PyTree) -> PyTree:
    """Returns θ′: the parameters with the optimizer's part replaced.

    Args:
      params: θᵗ.
      tuned: what `tuned` returned for θᵗ, updated.
      state: the method's state.
    """
    del params, state
    return tuned

  def settle(
    self, tuning: Tuning, seed_params: PyTree, step: jax.Array
  ) -> Tuning:
    """Ends a step: projects θ′, by default with `apply`.

    Args:
      tuning: θ′, and the states after the optimizer's step.
      seed_params: θ⁰.
      step: int32 [], t.
    """
    del step
    params, state = self.apply(tuning.params, seed_params, tuning.state)
    return tuning._replace(params=params, state=state)

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

  Attributes:
    keeps_to_budget: whether never more than `free_at_most` components differ
      from the seed.
  """

  keeps_to_budget = True

  def __init_subclass__(cls, **options: Any) -> None:
    """Registers each method as a pytree without leaves."""
    super().__init_subclass__(**options)
    jax.tree_util.register_static(cls)

  @property
  def phase_starts(self) -> Sequence[int]:
    """The steps at which the method's phases begin; the first is 0."""
    return (0,)

  def phase(self, number: int) -> 'Projection':
    """Returns the method of a phase.

    A method with several phases, such as one that scores parameters first, is a
    sequence of methods. The next one begins with its `enter`, and with a fresh
    state of the optimizer.

    Args:
      number: an index of `phase_starts`.
    """
    del number
    return self

  def at(self, step: int) -> 'Projection':
    """Returns the method of the phase that makes the step after `step`."""
    return self.phase(sum(start <= step for start in self.phase_starts) - 1)

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
    """Returns the method's budget: how many parameters are free in the end.

    Args:
      shapes: the trained parameters, or their shapes.
    """
    raise NotImplementedError

  def free_at_most(self, shapes: PyTree) -> int:
    """Returns how many parameters can differ from the seed at any time.

    More than `free` for a method that tunes other parameters on the way, or
    that leaves those which it no longer tunes as they are.

    Args:
      shapes: the trained parameters, or their shapes.
    """
    return self.free(shapes)

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

    The default checks that at most `free_at_most` components differ from the
    seed. The wrong seed differs from the parameters in nearly every component.

    Args:
      params: θᵗ.
      seed_params: θ⁰.
    """
    layout = silos.make_layout(params, 'per_tensor')
    free = reports.count_free(layout, params, seed_params)
    return int(free.sum()) <= self.free_at_most(params)
