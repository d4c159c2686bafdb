"""An optimizer of T5X, followed by a projection.

The state has T5X's own fields, `step` and `param_states`. With a projection it
also has `seed`, θ⁰, `projection` and `refused_in_row`. Without one, checkpoints
are those of plain T5X.
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
from dst_t5x.core.errors import UserError
from dst_t5x.engine import finiteness
from dst_t5x.engine import trained as trained_lib
from dst_t5x.method import api as methods
from dst_t5x.models import api

PyTree = Any
# The fields of an optimizer state of T5X.
_INNER = ('step', 'param_states')
# The names of adapters' axes, which T5X's rules do not have.
ADDED_AXES = ('lora_rank', 'prompt')


class SubsetState(flax.struct.PyTreeNode):
  """The states of the optimizer and of the projection.

  Attributes:
    step: int32 [], the number of completed steps.
    param_states: the inner optimizer's states of the trained parameters.
    seed: θ⁰ of the trained parameters; () if the projection does not keep it.
      All NaN until `SubsetOptimizer.begin` sets it, because T5X initialises the
      state from random parameters, which are not the seed.
    projection: the projection's state.
    refused_in_row: int32 [], how many of the last steps were refused in a row;
      () without a projection.
  """

  step: jax.Array
  param_states: PyTree
  seed: PyTree = ()
  projection: PyTree = ()
  refused_in_row: Any = ()


def logical_factor_rules() -> Mapping[str, adafactor.FactorDim]:
  """Returns T5X's rules for AdaFactor, extended to adapters' axes."""
  added = dict.fromkeys(ADDED_AXES, adafactor.FactorDim.NONE)
  return {**adafactor.standard_logical_factor_rules(), **added}


class SubsetOptimizer(optimizers.OptimizerDef):
  """An optimizer of T5X that trains some of the parameters, and projects.

  With a projection, a step that is not finite is refused, as in
  `Trainer.train_step`: only the counts of steps change.
  """

  def __init__(
    self,
    inner: optimizers.OptimizerDef,
    network: api.Network,
    projection: methods.Projection,
    trained: Sequence[str] | None = None,
  ) -> None:
    """Stores the method's settings.

    Args:
      inner: an optimizer of T5X; may be a MultiOptimizer.
      network: the network. If it has an adapter, only the adapter is trained.
      projection: the method.
      trained: TRAINED; see `trained.expressions`.

    Raises:
      UserError: the arguments contradict each other.
    """
    if not projection.acts_after_step or len(projection.phase_starts) > 1:
      raise UserError(
        f'{projection.settings()["method"]}: T5X runs only methods that act '
        "after the optimizer's step; use python -m dst_t5x.train"
      )
    self.inner = inner
    self.projection = projection
    self._trained = trained_lib.expressions(network, projection, trained)

  @property
  def hyper_params(self) -> Any:
    """The hyperparameters of the inner optimizer."""
    return self.inner.hyper_params

  def update_hyper_params(self, **overrides: Any) -> Any:
    """Returns them with some replaced, such as `learning_rate`."""
    return self.inner.update_hyper_params(**overrides)

  def set_param_axes(self, param_logical_axes: PyTree) -> None:
    """Passes the axis names of trained parameters to the inner optimizer."""
    if hasattr(self.inner, 'set_param_axes'):
      self.inner.set_param_axes(self.split(param_logical_axes)[0])

  def split(self, params: PyTree) -> tuple[PyTree, PyTree]:
    """Returns the trained and the frozen parameters, as T5X's FrozenDicts."""
    trained, frozen = parts.split(params, self._trained)
    return flax.core.freeze(trained), flax.core.freeze(frozen)

  def init_state(self, params: PyTree) -> SubsetState:
    """Returns the state for T5X's random parameters, with a seed of NaNs."""
    state = self._state(params)
    unknown = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), state.seed)
    return state.replace(seed=unknown)

  def begin(self, params: PyTree) -> optimizers.Optimizer:
    """Returns the optimizer before the first step from the seed; jittable.

    Args:
      params: the pretrained parameters, and an adapter's initial ones.
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
    """Returns parameters and state after one step of the paper's Algorithm 1.

    Args:
      hyper_params: the hyperparameters of the inner optimizer.
      params: θᵗ, all parameters.
      state: the state at step t.
      grads: the gradients of all parameters; frozen ones are ignored.
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
    settled = self.projection.settle(
      methods.Tuning(thaw(new_params), (), state.projection),
      theta_0,
      state.step,
    )
    return flax.core.freeze(settled.params), settled.state

  def derive_logical_axes(
    self, optimizer: optimizers.Optimizer, param_logical_axes: PyTree
  ) -> optimizers.Optimizer:
    """Returns the optimizer with the names of axes in place of its arrays.

    The seed is sharded like the parameters, and the inner optimizer's state as
    that optimizer defines. The projection's state is small and replicated.
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
    """Returns target and state as nested dicts, for checkpoints."""
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
    """Returns the fields that T5X's own state does not have."""
    if not self.projection.constrains:
      return {}
    names = ['projection', 'refused_in_row']
    if self.projection.keep_seed:
      names.append('seed')
    return {name: getattr(state, name) for name in names}

  def restore_state(
    self, opt_target: PyTree, opt_state: SubsetState, state_dict: Any
  ) -> tuple[PyTree, SubsetState]:
    """Returns target and state from nested dicts, in the given structures."""
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
  """Returns the content with empty dicts restored, which T5X may drop."""
  if not isinstance(content, Mapping):
    return content
  whole = serialization.to_state_dict(like)
  dropped: dict[str, Any] = {
    name: {}
    for name, value in whole.items()
    if isinstance(value, Mapping) and not value
  }
  return dropped | dict(content)
