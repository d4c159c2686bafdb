"""The training step: loss, gradient, optimizer, projection.

`Trainer.train_step` has the whole step. `Program.settle` is what projects.
"""

from collections.abc import Sequence
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
from dst_t5x.engine import narrow
from dst_t5x.engine import optimizers
from dst_t5x.engine import trained as trained_lib
from dst_t5x.method import api as methods
from dst_t5x.models import api

PyTree = Any
Batch = dict[str, jax.Array]


class TrainState(NamedTuple):
  """The state that a step changes.

  Attributes:
    step: int32 [], the number of completed steps.
    params: θᵗ, the trained parameters; see `narrow.Held`.
    opt_state: the optimizer's state. It follows θ′, not the projected
      parameters.
    projection_state: the projection's state.
    refused_steps: int32 [], the number of refused steps; see
      `Trainer.train_step`.
    refused_in_row: int32 [], how many of the last steps were refused in a row.
  """

  step: jax.Array
  params: PyTree
  opt_state: PyTree
  projection_state: PyTree
  refused_steps: jax.Array
  refused_in_row: jax.Array


class Constants(NamedTuple):
  """The inputs of a step that no step changes.

  Attributes:
    seed: θ⁰ of the trained parameters; () if the projection does not keep it.
      In SEED_DTYPE, as `frozen`.
    frozen: the parameters that are not trained.
  """

  seed: PyTree = ()
  frozen: PyTree = ()


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=['optimizer', 'projection'],
  meta_fields=['network', 'loss', 'microbatches', 'trained', 'seed_dtype'],
)
@dataclasses.dataclass(frozen=True)
class Trainer:
  """The pure functions of training.

  A trainer is a pytree. Its leaves are numbers of the optimizer and, in a
  `program`, of the projection. Programs that differ only in leaves share the
  compiled `jax.jit(Trainer.init)` and `jax.jit(Trainer.train_step)`.

  Attributes:
    network: the model, with the method's adapter if it has one.
    optimizer: gradients -> updates, and its learning rate.
    projection: the method, applied after the optimizer's step.
    loss: the loss.
    microbatches: the number of parts into which a batch is split to save
      memory. Their gradients are summed, so a step uses the gradient of the
      whole batch.
    trained: regular expressions for the paths of the trained parameters, if
      there is no adapter; None for all parameters.
    seed_dtype: the dtype in which the seed and frozen parameters are held; see
      `narrow`. It changes no result.

  Raises:
    UserError: the settings contradict each other, or cannot be hashed.
  """

  network: api.Network
  optimizer: optimizers.Optimizer
  projection: methods.Projection
  loss: losses.Loss = dataclasses.field(default_factory=losses.Loss)
  microbatches: values.Positive = 1
  trained: Sequence[str] | None = None
  seed_dtype: narrow.SeedDtype = 'float32'

  def __post_init__(self) -> None:
    check_positive('MICROBATCHES', self.microbatches)
    values.check({'SEED_DTYPE': (self.seed_dtype, narrow.SeedDtype)})
    if isinstance(self.trained, list):  # Gin passes lists; `jit` needs a hash.
      object.__setattr__(self, 'trained', tuple(self.trained))
    trained_lib.expressions(self.network, self.projection, self.trained)
    settings: list[Any] = [self.network, self.loss]
    # A program of a projection has arrays as leaves, and no hash.
    if not jax.tree.leaves(self.projection):
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
    """Returns the trained parameters and the frozen ones."""
    return parts.split(
      params,
      trained_lib.expressions(self.network, self.projection, self.trained),
    )

  def seed_path(
    self, shapes: PyTree, path: str | None, from_scratch: bool
  ) -> str | None:
    """Returns the seed's path; None for random parameters.

    Args:
      shapes: the shapes of all parameters.
      path: INITIAL_CHECKPOINT_PATH.
      from_scratch: whether to train from random parameters.

    Raises:
      UserError: the path is missing, or the method needs a seed.
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

  def room(self, shapes: PyTree) -> int | None:
    """Returns how long the list of θ is; None if θ is held whole.

    Args:
      shapes: the shapes of all parameters.

    Raises:
      UserError: the method does not go with SEED_DTYPE.
    """
    trained, frozen = self.split(shapes)
    return narrow.room_for(self.seed_dtype, self.projection, trained, frozen)

  def check_seed(self, seed: PyTree, path: str) -> None:
    """Checks that `seed_dtype` holds a seed exactly; see `narrow`."""
    narrow.check_seed(self.seed_dtype, seed, path)

  def program(self, shapes: PyTree) -> 'Trainer':
    """Returns the trainer whose `init` and `train_step` are to be compiled.

    Args:
      shapes: the trained parameters, or their shapes.
    """
    # A step calls only those functions of a projection that a program has.
    projection: Any = self.projection.prepare(shapes)
    return dataclasses.replace(self, projection=projection)

  def at(self, step: int) -> 'Trainer':
    """Returns the trainer of the phase that makes the step after `step`."""
    return dataclasses.replace(self, projection=self.projection.at(step))

  def check_batch_size(self, batch_size: int) -> None:
    """Raises UserError if the batch size is no multiple of `microbatches`."""
    if batch_size % self.microbatches:
      raise UserError(
        f'BATCH_SIZE = {batch_size} is not a multiple of '
        f'MICROBATCHES = {self.microbatches}'
      )

  def init(self, params: PyTree) -> TrainState:
    """Returns the state before the first step.

    Args:
      params: the trained parameters.
    """
    projection_state = self.projection.init(params)
    tuned = self.projection.tuned(params, projection_state)
    return TrainState(
      step=jnp.zeros((), jnp.int32),
      params=params,
      opt_state=self.optimizer.init(tuned),
      projection_state=projection_state,
      refused_steps=jnp.zeros((), jnp.int32),
      refused_in_row=jnp.zeros((), jnp.int32),
    )

  def enter(self, state: TrainState, seed: PyTree) -> TrainState:
    """Returns the state with which the projection's phase begins, θ whole.

    Args:
      state: the state at the end of the phase before.
      seed: θ⁰ of the trained parameters.
    """
    params, projection_state = self.projection.enter(
      state.params, seed, state.projection_state
    )
    tuned = self.projection.tuned(params, projection_state)
    return state._replace(
      params=params,
      opt_state=self.optimizer.init(tuned),
      projection_state=projection_state,
    )

  def train_step(
    self,
    state: TrainState,
    constants: Constants,
    batch: Batch,
    dropout_key: jax.Array,
    report: jax.Array,
  ) -> tuple[TrainState, dict[str, jax.Array]]:
    """Returns the state after one step of the paper's Algorithm 1, and metrics.

    A step whose loss, new parameters or optimizer state is not finite is
    refused: only the step counts change, and with `step` the learning rate.
    Otherwise a NaN would enter the subset, or an infinity empty it.

    Args:
      state: the state before the step.
      constants: seed and frozen parameters.
      batch: the network's features, each [batch, length].
      dropout_key: the run's PRNG key; the step is folded into it.
      report: bool [], whether to compute norms, which takes a pass over the
        parameters.

    Returns:
      The next state, and metrics, all []. `gradient_norm` is over the
      components that are free before the step, `update_norm` over those that
      are free after it. Both are NaN without `report`.
    """
    key = jax.random.fold_in(dropout_key, state.step)
    held = narrow.Held(state.params, constants.seed)
    gradients, sums = self._gradients(
      held.theta(), constants.frozen, batch, key
    )
    chosen = self.projection.choose(
      methods.Tuning(held.theta(), state.opt_state, state.projection_state),
      gradients,
      held.kept(self.projection),
      state.step,
    )
    gradients = self.projection.tuned(gradients, chosen.state)
    # Before the optimizer's step, which can then reuse the gradients' memory.
    gradient_norm = self._norm(report, gradients, held, chosen.state)
    before = self.projection.tuned(held.theta(), chosen.state)
    updates, opt_state = self.optimizer.update(
      gradients, chosen.opt_state, before, state.step, self.projection.rate
    )

    def accepted() -> methods.Tuning:
      theta = held.theta()
      theta_0 = held.seed_for(self.projection, chosen.state)
      again = held.tuned_again(self.projection, theta, chosen.state, before)
      tuned = optax.apply_updates(again, updates)
      new_params = self.projection.put(theta, tuned, chosen.state)
      settled = self.projection.settle(
        methods.Tuning(new_params, opt_state, chosen.state), theta_0, state.step
      )
      return settled._replace(params=held.replaced(settled.params))

    def refused() -> methods.Tuning:
      return methods.Tuning(
        state.params, state.opt_state, state.projection_state
      )

    is_finite = finiteness.all_finite(
      (sums.loss, optax.apply_updates(before, updates), opt_state)
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
    held = held._replace(params=params)
    metrics = self._metrics(sums, state.step) | {
      'gradient_norm': gradient_norm,
      'update_norm': self._norm(report, updates, held, projection_state),
      'refused_steps': next_state.refused_steps,
      'refused_in_row': next_state.refused_in_row,
    }
    return next_state, metrics | held.metrics()

  def _norm(
    self, wanted: jax.Array, tree: PyTree, held: narrow.Held, state: PyTree
  ) -> jax.Array:
    """Returns the norm over free components if it is wanted, else NaN."""

    def norm() -> jax.Array:
      return self.projection.norm_of_free(
        tree, held.theta(), held.kept(self.projection), state
      )

    return lax.cond(wanted, norm, lambda: jnp.float32(jnp.nan))

  def _metrics(
    self, sums: losses.Sums, step: jax.Array
  ) -> dict[str, jax.Array]:
    learning_rate = self.optimizer.learning_rate(step)
    if self.projection.rate != 1:
      learning_rate = self.projection.rate * learning_rate
    return sums.averages() | {
      'learning_rate': jnp.asarray(learning_rate, jnp.float32),
      'target_tokens': sums.tokens,
    }

  def _gradients(
    self, params: PyTree, frozen: PyTree, batch: Batch, key: jax.Array
  ) -> tuple[PyTree, losses.Sums]:
    """Returns the gradient of the normalized loss, and the loss's sums.

    The gradient is that of the trained parameters.
    """
    normalizer = self.loss.normalizer(self.network.targets(batch))

    def loss(
      params: PyTree, part: Batch, key: jax.Array
    ) -> tuple[jax.Array, losses.Sums]:
      whole = parts.join(params, narrow.for_network(frozen))
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
    # Adjacent rows go to different microbatches, so that each device has rows
    # of every microbatch.
    return x.reshape(-1, self.microbatches, *x.shape[1:]).swapaxes(0, 1)
