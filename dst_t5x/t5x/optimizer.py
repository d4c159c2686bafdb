"""Any optimizer of T5X, followed by a projection.

The state is T5X's own, `step` and `param_states`, and beside these what the
projection needs: `seed`, θ⁰, and `projection`. Without a projection there is
nothing beside them, and checkpoints are those of plain T5X.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import flax
from flax import serialization
import jax
from jax import lax
import jax.numpy as jnp
from t5x import adafactor
from t5x import optimizers

from dst_t5x.core import parts
from dst_t5x.engine import finiteness
from dst_t5x.engine import trained as trained_lib
from dst_t5x.method import api as methods
from dst_t5x.models import api

PyTree = Any
# What an optimizer state of T5X consists of.
_INNER = ('step', 'param_states')
# Names that adapters give to axes, of which T5X's rules know nothing.
ADDED_AXES = ('lora_rank', 'prompt')


class SubsetState(flax.struct.PyTreeNode):
  """The optimizer's state and the projection's.

  Attributes:
    step: int32 [].
    param_states: the inner optimizer's, of what is trained.
    seed: θ⁰ of what is trained; () where the projection keeps none. All NaN
      until `SubsetOptimizer.begin` has set it: T5X initialises the state from
      random parameters, which are not the seed.
    projection: the projection's.
    refused_in_row: int32 [], how many of the last steps changed nothing because
      they were not finite; () without a projection.
  """

  step: jax.Array
  param_states: PyTree
  seed: PyTree = ()
  projection: PyTree = ()
  refused_in_row: Any = ()


def logical_factor_rules() -> Mapping[str, adafactor.FactorDim]:
  """Returns T5X's rules for AdaFactor, and those for adapters' axes."""
  added = dict.fromkeys(ADDED_AXES, adafactor.FactorDim.NONE)
  return {**adafactor.standard_logical_factor_rules(), **added}


class SubsetOptimizer(optimizers.OptimizerDef):
  """An optimizer of T5X that trains a part of the model, and projects.

  A step that is not finite is refused, as in `Trainer.train_step`: everything
  stays as it was, but for the count of steps.
  """

  def __init__(
    self,
    inner: optimizers.OptimizerDef,
    network: api.Network,
    projection: methods.Projection,
    trained: Sequence[str] | None = None,
  ) -> None:
    """Takes what the method's gin file says.

    Args:
      inner: an optimizer of T5X, a MultiOptimizer too.
      network: whose adapter is trained, if it has one.
      projection: what is done to the parameters after the optimizer's step.
      trained: TRAINED; see `trained.expressions`.

    Raises:
      UserError: these do not go together.
    """
    self.inner = inner
    self.projection = projection
    self._trained = trained_lib.expressions(network, projection, trained)

  @property
  def hyper_params(self) -> Any:
    """The inner optimizer's."""
    return self.inner.hyper_params

  def update_hyper_params(self, **overrides: Any) -> Any:
    """Returns the inner optimizer's, with `learning_rate`, say, replaced."""
    return self.inner.update_hyper_params(**overrides)

  def set_param_axes(self, param_logical_axes: PyTree) -> None:
    """Tells the inner optimizer the names of the axes of what is trained."""
    if hasattr(self.inner, 'set_param_axes'):
      self.inner.set_param_axes(self.split(param_logical_axes)[0])

  def split(self, params: PyTree) -> tuple[PyTree, PyTree]:
    """Returns what is trained and what is frozen, in T5X's FrozenDicts."""
    trained, frozen = parts.split(params, self._trained)
    return flax.core.freeze(trained), flax.core.freeze(frozen)

  def init_state(self, params: PyTree) -> SubsetState:
    """Returns the state before the first step, for parameters of no meaning."""
    state = self._state(params)
    unknown = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), state.seed)
    return state.replace(seed=unknown)

  def begin(self, params: PyTree) -> optimizers.Optimizer:
    """Returns the state before the first step from the seed; jittable.

    Args:
      params: the pretrained parameters, and those that an adapter adds.
    """
    state = self._state(params)
    return optimizers.Optimizer(self, state, jax.tree.map(jnp.copy, params))

  def _state(self, params: PyTree) -> SubsetState:
    trained, _ = self.split(params)
    inner = self.inner.init_state(trained)
    step = jnp.zeros((), jnp.int32)
    if not self.projection.constrains:
      return SubsetState(step, inner.param_states)
    projection = self.projection.init(flax.core.unfreeze(trained))
    return SubsetState(
      step=step,
      param_states=inner.param_states,
      seed=jax.tree.map(jnp.copy, trained) if self.projection.keep_seed else (),
      projection=projection,
      refused_in_row=jnp.zeros((), jnp.int32),
    )

  def apply_gradient(
    self, hyper_params: Any, params: PyTree, state: SubsetState, grads: PyTree
  ) -> tuple[PyTree, SubsetState]:
    """One step of the paper's Algorithm 1: the optimizer, and the projection.

    Args:
      hyper_params: the inner optimizer's.
      params: θᵗ.
      state: that goes with it.
      grads: of all parameters; those of frozen ones are not used.
    """
    before, frozen = self.split(params)
    new_params, inner = self.inner.apply_gradient(
      hyper_params,
      before,
      optimizers.OptimizerState(state.step, state.param_states),
      self.split(grads)[0],
    )

    def accepted() -> tuple[PyTree, PyTree, PyTree]:
      projected, projection = self._project(before, new_params, state)
      return projected, inner.param_states, projection

    def refused() -> tuple[PyTree, PyTree, PyTree]:
      return before, state.param_states, state.projection

    next_state = state.replace(step=state.step + 1)
    if not self.projection.constrains:
      after, next_state = (
        new_params,
        next_state.replace(param_states=inner.param_states),
      )
    else:
      is_finite = finiteness.all_finite((new_params, inner.param_states))
      after, param_states, projection = lax.cond(is_finite, accepted, refused)
      next_state = next_state.replace(
        param_states=param_states,
        projection=projection,
        refused_in_row=jnp.where(is_finite, 0, state.refused_in_row + 1),
      )
    return flax.core.freeze(parts.join(after, frozen)), next_state

  def _project(
    self, before: PyTree, new_params: PyTree, state: SubsetState
  ) -> tuple[PyTree, PyTree]:
    """Returns the projected parameters and the projection's next state."""
    thaw = flax.core.unfreeze
    theta_0 = self.projection.seed(
      thaw(before), thaw(state.seed), state.projection
    )
    params, projection = self.projection.apply(
      thaw(new_params), theta_0, state.projection
    )
    return flax.core.freeze(params), projection

  def derive_logical_axes(
    self, optimizer: optimizers.Optimizer, param_logical_axes: PyTree
  ) -> optimizers.Optimizer:
    """Returns the optimizer with the names of axes in place of its arrays.

    The seed is sharded as the parameters are, and the inner optimizer's state
    as this says; what the projection needs is small, and replicated.
    """
    axes, _ = self.split(param_logical_axes)
    inner = self.inner.derive_logical_axes(self._inner(optimizer), axes)
    state = optimizer.state.replace(
      step=None,
      param_states=inner.state.param_states,
      seed=axes if jax.tree.leaves(optimizer.state.seed) else (),
      projection=jax.tree.map(lambda _: None, optimizer.state.projection),
      refused_in_row=None if self.projection.constrains else (),
    )
    return optimizers.Optimizer(self, state, param_logical_axes)

  def _inner(self, optimizer: optimizers.Optimizer) -> optimizers.Optimizer:
    state = optimizer.state
    return optimizers.Optimizer(
      self.inner,
      optimizers.OptimizerState(state.step, state.param_states),
      self.split(optimizer.target)[0],
    )

  def state_dict(self, target: PyTree, state: SubsetState) -> Mapping[str, Any]:
    """Returns nested dicts for checkpoints: the inner optimizer's and ours."""
    inner = self._inner(optimizers.Optimizer(self, state, target))
    return {
      'target': serialization.to_state_dict(target),
      'state': {
        **inner.state_dict()['state'],
        **{
          name: serialization.to_state_dict(value)
          for name, value in self._ours(state).items()
        },
      },
    }

  def _ours(self, state: SubsetState) -> dict[str, PyTree]:
    """Returns what the state has that T5X's has not."""
    if not self.projection.constrains:
      return {}
    names = ['projection', 'refused_in_row']
    if self.projection.keep_seed:
      names.append('seed')
    return {name: getattr(state, name) for name in names}

  def restore_state(
    self, opt_target: PyTree, opt_state: SubsetState, state_dict: Any
  ) -> tuple[PyTree, SubsetState]:
    """Returns target and state of the given structure from nested dicts."""
    content = state_dict['state']
    inner = self._inner(optimizers.Optimizer(self, opt_state, opt_target))
    restored = inner.restore_state(
      {
        'target': self.split(state_dict['target'])[0],
        'state': {name: content[name] for name in _INNER},
      }
    )
    ours = {
      name: serialization.from_state_dict(
        like, _with_empty(like, content[name])
      )
      for name, like in self._ours(opt_state).items()
    }
    target = serialization.from_state_dict(opt_target, state_dict['target'])
    return target, SubsetState(
      restored.state.step, restored.state.param_states, **ours
    )


def _with_empty(like: PyTree, content: Any) -> Any:
  """Returns the content with what is empty, which T5X may have dropped."""
  if not isinstance(content, Mapping):
    return content
  whole = serialization.to_state_dict(like)
  dropped: dict[str, Any] = {
    name: {}
    for name, value in whole.items()
    if isinstance(value, Mapping) and not value
  }
  return dropped | dict(content)
