"""The training step: loss, gradient, optimizer, projection.

Everything that happens in a step stands in `Trainer.train_step`.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import optax

from dst_t5x.core import parts
from dst_t5x.core import values
from dst_t5x.core.errors import UserError, check_positive
from dst_t5x.engine import finiteness
from dst_t5x.engine import losses
from dst_t5x.engine import optimizers
from dst_t5x.engine import trained as trained_lib
from dst_t5x.method import api as methods
from dst_t5x.models import api

PyTree = Any
Batch = dict[str, jax.Array]


class TrainState(NamedTuple):
  """What a step changes.

  Attributes:
    step: int32 [], steps of this run that are done.
    params: θᵗ, of what is trained.
    opt_state: the optimizer's; it follows θ′, not the projected parameters.
    projection_state: the projection's.
    refused_steps: int32 [], steps that changed nothing because they were not
      finite.
    refused_in_row: int32 [], how many of them are the last ones.
  """

  step: jax.Array
  params: PyTree
  opt_state: PyTree
  projection_state: PyTree
  refused_steps: jax.Array
  refused_in_row: jax.Array


class Constants(NamedTuple):
  """What no step changes.

  Attributes:
    seed: θ⁰, of what is trained; () where the projection does not keep it.
    frozen: the parameters that are not trained.
  """

  seed: PyTree = ()
  frozen: PyTree = ()


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=['optimizer', 'projection'],
  meta_fields=['network', 'loss', 'microbatches', 'trained'],
)
@dataclasses.dataclass(frozen=True)
class Trainer:
  """The pure functions of training.

  A pytree whose leaves are the optimizer's numbers and, in a `program`, the
  projection's: `jax.jit(Trainer.init)` and `jax.jit(Trainer.train_step)` are
  compiled once for all programs that differ in nothing else.

  Attributes:
    network: the model, with the method's adapter if it has one.
    optimizer: gradients -> updates, and its learning rate.
    projection: what is done to the parameters after the optimizer's step.
    loss: the loss.
    microbatches: parts into which a batch is split to save memory. Gradients
      are summed over them, so that the step is that of the whole batch.
    trained: regular expressions over the paths of what is trained, where there
      is no adapter; by default everything.

  Raises:
    UserError: these do not go together.
  """

  network: api.Network
  optimizer: optimizers.Optimizer
  projection: methods.Projection
  loss: losses.Loss = dataclasses.field(default_factory=losses.Loss)
  microbatches: values.Positive = 1
  trained: Sequence[str] | None = None

  def __post_init__(self) -> None:
    check_positive('MICROBATCHES', self.microbatches)
    if isinstance(self.trained, list):  # From gin; `jit` hashes us.
      object.__setattr__(self, 'trained', tuple(self.trained))
    trained_lib.expressions(self.network, self.projection, self.trained)
    settings: list[Any] = [self.network, self.loss]
    if not jax.tree.leaves(self.projection):  # Else it is a program's.
      settings.append(self.projection)
    for part in settings:
      try:
        hash(part)
      except TypeError as e:
        raise UserError(
          f'{type(part).__name__} has a setting that cannot change and be '
          f'compared ({e}): make it a tuple, or a frozen dataclass'
        ) from e

  def split(self, params: PyTree) -> tuple[PyTree, PyTree]:
    """Returns the parameters that are trained, and the frozen ones."""
    return parts.split(
      params,
      trained_lib.expressions(self.network, self.projection, self.trained),
    )

  def seed_path(
    self, shapes: PyTree, path: str | None, from_scratch: bool
  ) -> str | None:
    """Returns where the seed is, None for random parameters.

    Args:
      shapes: of all parameters.
      path: INITIAL_CHECKPOINT_PATH.
      from_scratch: whether there is no seed, on purpose.

    Raises:
      UserError: this method needs a seed, or none is named.
    """
    if not from_scratch:
      if not path:
        raise UserError(
          'no seed: set INITIAL_CHECKPOINT_PATH, or use gin/runs/pretrain.gin '
          'to train from random parameters'
        )
      return path
    if self.projection.constrains or self.split(shapes)[1]:
      raise UserError(
        'this method tunes a pretrained seed: use gin/runs/finetune.gin and '
        'set INITIAL_CHECKPOINT_PATH'
      )
    return None

  def program(self, shapes: PyTree) -> 'Trainer':
    """Returns the trainer whose `init` and `train_step` are compiled.

    Args:
      shapes: of what is trained, or the parameters.
    """
    # A step calls no more of a projection than its program has.
    projection: Any = self.projection.prepare(shapes)
    return dataclasses.replace(self, projection=projection)

  def check_batch_size(self, batch_size: int) -> None:
    """Raises UserError if a batch cannot be split evenly."""
    if batch_size % self.microbatches:
      raise UserError(
        f'BATCH_SIZE = {batch_size} is not a multiple of '
        f'MICROBATCHES = {self.microbatches}'
      )

  def init(self, params: PyTree) -> TrainState:
    """Returns the state before the first step; `params` are the trained."""
    return TrainState(
      step=jnp.zeros((), jnp.int32),
      params=params,
      opt_state=self.optimizer.init(params),
      projection_state=self.projection.init(params),
      refused_steps=jnp.zeros((), jnp.int32),
      refused_in_row=jnp.zeros((), jnp.int32),
    )

  def train_step(
    self,
    state: TrainState,
    constants: Constants,
    batch: Batch,
    dropout_key: jax.Array,
    report: jax.Array,
  ) -> tuple[TrainState, dict[str, jax.Array]]:
    """One step of the paper's Algorithm 1.

    A step whose loss, update or optimizer state is not finite is refused:
    everything stays as it was, but for the count of steps, which the learning
    rate follows. A NaN would win the subset else, or an infinity empty it.

    Args:
      state: where training stands.
      constants: seed and frozen parameters.
      batch: the model's features, each [batch, length].
      dropout_key: the run's key; the step is folded into it.
      report: bool [], whether norms are wanted, which cost a pass over the
        parameters.

    Returns:
      The next state, and metrics, all []. The gradient's norm is over what is
      free before the step, the update's over what is free after it.
    """
    key = jax.random.fold_in(dropout_key, state.step)
    gradients, sums = self._gradients(
      state.params, constants.frozen, batch, key
    )
    # Before the optimizer's step, which may then take the gradients' place.
    gradient_norm = _if(
      report,
      self.projection.norm_of_free,
      gradients,
      state.params,
      constants.seed,
      state.projection_state,
    )
    updates, opt_state = self.optimizer.update(
      gradients, state.opt_state, state.params, state.step
    )

    def accepted() -> tuple[PyTree, PyTree, PyTree]:
      theta_0 = self.projection.seed(
        state.params, constants.seed, state.projection_state
      )
      new_params = optax.apply_updates(state.params, updates)
      params, projection_state = self.projection.apply(
        new_params, theta_0, state.projection_state
      )
      return params, opt_state, projection_state

    def refused() -> tuple[PyTree, PyTree, PyTree]:
      return state.params, state.opt_state, state.projection_state

    is_finite = finiteness.all_finite(
      (sums.loss, optax.apply_updates(state.params, updates), opt_state)
    )
    params, opt_state, projection_state = lax.cond(is_finite, accepted, refused)
    next_state = TrainState(
      step=state.step + 1,
      params=params,
      opt_state=opt_state,
      projection_state=projection_state,
      refused_steps=state.refused_steps + ~is_finite,
      refused_in_row=jnp.where(is_finite, 0, state.refused_in_row + 1),
    )
    metrics = self._metrics(sums, state.step) | {
      'gradient_norm': gradient_norm,
      'update_norm': _if(
        report,
        self.projection.norm_of_free,
        updates,
        params,
        constants.seed,
        projection_state,
      ),
      'refused_steps': next_state.refused_steps,
      'refused_in_row': next_state.refused_in_row,
    }
    return next_state, metrics

  def _metrics(
    self, sums: losses.Sums, step: jax.Array
  ) -> dict[str, jax.Array]:
    learning_rate = self.optimizer.learning_rate(step)
    return sums.averages() | {
      'learning_rate': jnp.asarray(learning_rate, jnp.float32),
      'target_tokens': sums.tokens,
    }

  def _gradients(
    self, params: PyTree, frozen: PyTree, batch: Batch, key: jax.Array
  ) -> tuple[PyTree, losses.Sums]:
    """Returns the gradient of the normalized loss, and the loss's sums.

    Of frozen parameters there is none.
    """
    normalizer = self.loss.normalizer(self.network.targets(batch))

    def loss(
      params: PyTree, part: Batch, key: jax.Array
    ) -> tuple[jax.Array, losses.Sums]:
      whole = parts.join(params, frozen)
      sums = losses.forward(self.network, self.loss, whole, part, key)
      return sums.loss / normalizer, sums

    gradient = jax.grad(loss, has_aux=True)
    if self.microbatches == 1:
      return gradient(params, batch, key)
    microbatches = jax.tree.map(self._split, batch)
    keys = jax.random.split(key, self.microbatches)

    def add(total: PyTree, part: tuple[Batch, jax.Array]) -> Any:
      return jax.tree.map(jnp.add, total, gradient(params, *part)), None

    zeros = jax.tree.map(
      lambda x: jnp.zeros(x.shape, x.dtype),
      jax.eval_shape(
        gradient, params, jax.tree.map(lambda x: x[0], microbatches), key
      ),
    )
    return lax.scan(add, zeros, (microbatches, keys))[0]

  def _split(self, x: jax.Array) -> jax.Array:
    # Neighbours go to different parts, so that every device has its share.
    return x.reshape(-1, self.microbatches, *x.shape[1:]).swapaxes(0, 1)


def _if(
  wanted: jax.Array, number: Callable[..., jax.Array], *arguments: PyTree
) -> jax.Array:
  """Returns float32 [], a number that costs something, or NaN."""
  return lax.cond(
    wanted, lambda: number(*arguments), lambda: jnp.float32(jnp.nan)
  )
