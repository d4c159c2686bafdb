"""Optimizers from Optax, AdaFactor with T5X's settings; learning rates."""

from collections.abc import Callable, Mapping
import dataclasses
import re
from typing import Any, Literal

import jax
import optax
import optax.contrib

from dst_t5x.core import tree_paths
from dst_t5x.core import values
from dst_t5x.core.errors import UserError

PyTree = Any

Decay = Literal['constant', 'linear', 'cosine', 'rsqrt']
# Marks a static field: it is part of the compiled program, not an input.
_STATIC: Mapping[str, Any] = {'static': True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Schedule:
  """The learning rate as a function of the step; see `schedule`.

  Schedules that differ only in `base` share a compiled program: `base` is a
  leaf of this pytree.
  """

  base: float
  warmup_steps: int = dataclasses.field(default=0, metadata=_STATIC)
  decay: str = dataclasses.field(default='constant', metadata=_STATIC)
  decay_steps: int | None = dataclasses.field(default=None, metadata=_STATIC)

  def __call__(self, step: Any) -> Any:
    """Returns the learning rate, float32 [], at a step, int32 []."""
    warmup, base = self.warmup_steps, self.base
    rest = (self.decay_steps or 0) - warmup
    after: Mapping[str, Callable[[], optax.Schedule]] = {
      'constant': lambda: optax.schedules.constant_schedule(base),
      'linear': lambda: optax.schedules.linear_schedule(base, 0.0, rest),
      'cosine': lambda: optax.schedules.cosine_decay_schedule(base, rest),
      'rsqrt': lambda: _rsqrt(base, max(warmup, 1)),
    }
    if not warmup:
      return after[self.decay]()(step)
    rise = optax.schedules.linear_schedule(0.0, base, warmup)
    both = [rise, after[self.decay]()]
    return optax.schedules.join_schedules(both, [warmup])(step)


def schedule(
  base: values.NotNegative,
  warmup_steps: values.Count = 0,
  decay: Decay = 'constant',
  decay_steps: values.Positive | None = None,
) -> Schedule:
  """Returns the learning rate as a function of the step.

  Args:
    base: the highest learning rate.
    warmup_steps: steps over which it rises linearly from 0 to `base`.
    decay: the shape after the warm-up: `constant`; `linear` or `cosine` to 0 at
      `decay_steps`; `rsqrt`, base · √(warmup_steps / step), as in T5's
      pretraining (with warmup_steps of 1 if there is no warm-up).
    decay_steps: the step at which `linear` and `cosine` reach 0, counted from
      the start of this run, warm-up included.

  Raises:
    UserError: a number is out of range, the decay is unknown, or its number of
      steps is missing.
  """
  values.check(
    {
      'LEARNING_RATE': (base, values.NotNegative),
      'LEARNING_RATE_WARMUP_STEPS': (warmup_steps, values.Count),
      'LEARNING_RATE_DECAY': (decay, Decay),
      'LEARNING_RATE_DECAY_STEPS': (decay_steps, values.Positive | None),
    }
  )
  if decay in ('linear', 'cosine') and (
    decay_steps is None or decay_steps <= warmup_steps
  ):
    raise UserError(
      f'{decay} decay needs decay_steps above warmup_steps; they are '
      f'{decay_steps} and {warmup_steps}'
    )
  return Schedule(base, warmup_steps, decay, decay_steps)


def _rsqrt(base: float, start: int) -> optax.Schedule:
  return lambda step: base * jax.lax.rsqrt((step + start) / start)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Optimizer:
  """An Optax optimizer whose learning rate depends on the run's step.

  It has no step count of its own for the learning rate: refused steps count,
  and the reported rate is the one that was used.

  Attributes:
    make: learning rate, float32 [] -> gradient transformation, for example
      `optax.adam`.
    learning_rate: step -> learning rate; a `Schedule` has traced leaves.
  """

  make: Callable[[Any], optax.GradientTransformation] = dataclasses.field(
    metadata=_STATIC
  )
  learning_rate: optax.Schedule

  def __post_init__(self) -> None:
    if callable(self.learning_rate) and not isinstance(
      self.learning_rate, Schedule | jax.tree_util.Partial
    ):
      partial = jax.tree_util.Partial(self.learning_rate)
      object.__setattr__(self, 'learning_rate', partial)

  def init(self, params: PyTree) -> PyTree:
    """Returns the initial state."""
    return self.make(self.learning_rate(0)).init(params)

  def update(
    self,
    gradients: PyTree,
    state: PyTree,
    params: PyTree,
    step: Any,
    factor: float = 1.0,
  ) -> tuple[PyTree, PyTree]:
    """Returns the updates to add to the parameters, and the next state.

    Args:
      gradients: gradients of the trained parameters.
      state: the result of `init` or of the last `update`.
      params: θᵗ.
      step: int32 [], number of completed steps of the run.
      factor: a factor of the learning rate.
    """
    rate = self.learning_rate(step)
    if factor != 1:
      rate = factor * rate
    return self.make(rate).update(gradients, state, params)


@dataclasses.dataclass(frozen=True)
class _Adafactor:
  """See `adafactor`. Equal instances share a compiled program."""

  settings: tuple[tuple[str, Any], ...]

  def __call__(self, learning_rate: Any) -> optax.GradientTransformation:
    """Returns the gradient transformation for a learning rate."""
    settings = dict(self.settings)
    return _by_layer(optax.adafactor(learning_rate, **settings))


def adafactor(
  learning_rate: optax.Schedule,
  decay_rate: values.Share = 0.8,
  clipping_threshold: values.AboveZero | None = 1.0,
  min_dim_size_to_factor: values.Count = 128,
  multiply_by_parameter_scale: bool = True,
  momentum: values.BelowOne | None = None,
  weight_decay_rate: float | None = None,
) -> Optimizer:
  """Returns AdaFactor (Shazeer and Stern, 2018) with T5X's defaults.

  Each layer of a stacked tensor is treated separately, so that scanned and
  unscanned networks train equally.

  Args:
    learning_rate: step -> learning rate, relative to each tensor's scale.
    decay_rate: exponent of the second moments' decay, 1 − t^−decay_rate.
    clipping_threshold: RMS at which a tensor's update is clipped.
    min_dim_size_to_factor: smaller second moments are not factored.
    multiply_by_parameter_scale: whether to scale a tensor's update by the
      tensor's RMS.
    momentum: decay of the first moment; None for no momentum.
    weight_decay_rate: share of the weights to subtract in each step.
  """
  settings = {
    'min_dim_size_to_factor': min_dim_size_to_factor,
    'decay_rate': decay_rate,
    'multiply_by_parameter_scale': multiply_by_parameter_scale,
    'clipping_threshold': clipping_threshold,
    'momentum': momentum,
    'weight_decay_rate': weight_decay_rate,
  }
  return Optimizer(_Adafactor(tuple(settings.items())), learning_rate)


@dataclasses.dataclass(frozen=True)
class _AdamW:
  """See `adamw`. Equal instances share a compiled program."""

  settings: tuple[tuple[str, Any], ...]

  def __call__(self, learning_rate: Any) -> optax.GradientTransformation:
    """Returns the gradient transformation for a learning rate."""
    return optax.adamw(learning_rate, **dict(self.settings))


def adamw(
  learning_rate: optax.Schedule,
  b1: values.BelowOne = 0.9,
  b2: values.BelowOne = 0.999,
  eps: values.AboveZero = 1e-8,
  weight_decay: values.NotNegative = 0.0,
) -> Optimizer:
  """Returns AdamW (Loshchilov and Hutter, 2019).

  Args:
    learning_rate: step -> learning rate.
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: added to the root of the second moment.
    weight_decay: the share of a weight, times the learning rate, to subtract in
      each step. It pulls towards zero, not towards the seed.
  """
  settings = {'b1': b1, 'b2': b2, 'eps': eps, 'weight_decay': weight_decay}
  return Optimizer(_AdamW(tuple(settings.items())), learning_rate)


@dataclasses.dataclass(frozen=True)
class _Muon:
  """See `muon`. Equal instances share a compiled program."""

  settings: tuple[tuple[str, Any], ...]

  def __call__(self, learning_rate: Any) -> optax.GradientTransformation:
    """Returns the gradient transformation for a learning rate."""
    return optax.contrib.muon(
      learning_rate,
      muon_weight_dimension_numbers=_matrices,
      **dict(self.settings),
    )


def muon(
  learning_rate: optax.Schedule,
  beta: values.BelowOne = 0.95,
  weight_decay: values.NotNegative = 0.0,
  consistent_rms: values.AboveZero | None = 0.2,
) -> Optimizer:
  """Returns Muon (Jordan et al., 2024), and AdamW for what is no matrix.

  The momentum of each matrix is made orthogonal. Embeddings and the output
  projection are left to AdamW, as Muon's authors advise. A method that tunes a
  list of components has vectors only, so that Muon is AdamW there.

  Args:
    learning_rate: step -> learning rate.
    beta: decay of the momentum.
    weight_decay: the share of a weight, times the learning rate, to subtract in
      each step.
    consistent_rms: the root mean square to which a matrix's update is scaled,
      so that AdamW's learning rates fit (Liu et al., 2025, Section 2.2).
  """
  settings = {
    'beta': beta,
    'weight_decay': weight_decay,
    'adam_weight_decay': weight_decay,
    'consistent_rms': consistent_rms,
  }
  return Optimizer(_Muon(tuple(settings.items())), learning_rate)


def _matrices(params: PyTree) -> PyTree:
  """Returns which axes of a tensor Muon treats as a matrix's; None for none."""

  def axes(key_path: Any, leaf: jax.Array) -> Any:
    path = tree_paths.path_of(key_path)
    stacked = int(tree_paths.slice_paths(path, leaf.shape)[0])
    if leaf.ndim - stacked != 2 or re.search('embed|logits|lm_head', path):
      return None
    return optax.contrib.MuonDimensionNumbers(stacked, stacked + 1)

  return jax.tree_util.tree_map_with_path(axes, params)


def _by_layer(
  inner: optax.GradientTransformation,
) -> optax.GradientTransformation:
  """Applies `inner` to each layer of stacked tensors separately."""
  vmapped = optax.GradientTransformation(
    jax.vmap(inner.init), jax.vmap(inner.update)
  )

  def labels(params: PyTree) -> PyTree:
    def label(key_path: Any, leaf: jax.Array) -> str:
      path = tree_paths.path_of(key_path)
      stacked, _ = tree_paths.slice_paths(path, leaf.shape)
      # Each stack has its own group because the depths may differ.
      return f'stack_{path.split("/")[0]}' if stacked else 'rest'

    return jax.tree_util.tree_map_with_path(label, params)

  def transformations(params: PyTree) -> optax.GradientTransformation:
    names = sorted(set(jax.tree.leaves(labels(params))))
    if names in ([], ['rest']):
      return inner
    return optax.partition(
      {name: inner if name == 'rest' else vmapped for name in names}, labels
    )

  def init(params: PyTree) -> PyTree:
    return transformations(params).init(params)

  def update(
    updates: PyTree, state: PyTree, params: PyTree | None = None
  ) -> tuple[PyTree, PyTree]:
    return transformations(updates).update(updates, state, params)

  return optax.GradientTransformation(init, update)
