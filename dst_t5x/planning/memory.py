"""Bytes that a training step needs on one device: counted, and compiled.

There are two estimates. `count` counts arrays; it traces the network, which
takes seconds. `compiled` compiles the step with XLA, which takes up to minutes.
Its answer is XLA's plan for a CPU; other compilers fuse and order operations
differently. Neither allocates memory for arrays.
"""

from collections import Counter
import dataclasses
import functools
import math
import re
from typing import Any, NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

from dst_t5x.core import parts
from dst_t5x.core import tree_paths
from dst_t5x.engine import losses
from dst_t5x.engine import narrow as narrow_lib
from dst_t5x.engine import parameters
from dst_t5x.engine import partitioning
from dst_t5x.engine import trainer as trainer_lib
from dst_t5x.method import api as methods
from dst_t5x.models import api
from dst_t5x.planning import collectives

PyTree = Any


# Operations that compilers fuse into their uses, so that the results are not
# kept: dropout's selection, products, and the comparison in one-hot targets.
_FUSED = frozenset(
  [
    *('select_n', 'mul', 'eq', 'iota', 'convert_element_type'),
    *('broadcast_in_dim', 'transpose', 'reshape', 'squeeze', 'expand_dims'),
  ]
)
# If layers are recomputed, what surrounds them weighs more: of 1 + tanh and
# 1 − tanh, the factors of a capped logit's gradient, one is made of the other.
_FUSED_AROUND_LAYERS = _FUSED | {'sub'}
# Bytes of gradients, updates and new parameters together, relative to the
# parameters. Some replace others in memory; XLA's plans have 2.3 to 3.
_AT_ONCE = 2.5
# The same for methods whose optimizer sees a list of parameters only, which
# have gradients of all parameters, and no updates.
_AT_ONCE_OF_LISTS = 1.0
# Of the compiler for CPUs, what no accelerator's compiler does.
_AS_FOR_ACCELERATORS = {
  # YNNPACK multiplies matrices of at least 4,096 rows. XLA does not fuse
  # operations into it and writes constants out in full, which takes half as
  # much memory again.
  'xla_cpu_experimental_ynn_fusion_type': '',
  # CPUs compute in float32. XLA converts the bfloat16 inputs of all recomputed
  # layers before the backward pass's loop, and keeps both.
  'xla_disable_hlo_passes': 'while-loop-invariant-code-motion',
}


class Step(NamedTuple):
  """The abstract arguments of `Trainer.train_step`, with shardings."""

  state: trainer_lib.TrainState
  constants: trainer_lib.Constants
  batch: dict[str, Any]
  dropout_key: Any
  report: Any


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes on one device.

  Attributes:
    parameters: trained parameters.
    frozen: frozen parameters.
    seed: θ⁰, if the projection keeps it.
    optimizer: the state of the optimizer and of the projection.
    gradients: gradients, updates and new parameters that exist at the same time
      after the backward pass.
    activations: values that the forward pass keeps for the backward pass. Also
      the gradients that exist from the start of the backward pass: that of the
      output matrix, or all of them if layers are stacked. Also the largest
      matrix that devices gather from each other.
  """

  parameters: int
  frozen: int
  seed: int
  optimizer: int
  gradients: int
  activations: int

  @property
  def total(self) -> int:
    """The maximum at one time: activations are freed before updates exist."""
    lasting = self.parameters + self.frozen + self.seed + self.optimizer
    return lasting + max(self.gradients, self.activations)


def abstract_step(
  trainer: trainer_lib.Trainer,
  partitioner: partitioning.Partitioner,
  batch: dict[str, tuple[int, int]],
) -> Step:
  """Returns the abstract arguments of a step; call this under `activate`.

  Args:
    trainer: network and method.
    partitioner: the mesh.
    batch: feature of the model -> [batch, length].
  """
  space = parameters.ParameterSpace(trainer.network, partitioner)
  trained, frozen = trainer.split(space.shapes)
  shardings = parts.select(space.shardings, trained)
  state = jax.eval_shape(trainer.init, trained)
  placed = _placed(
    state, partitioner.like_parameters(state, trained, shardings)
  )
  room = trainer.room(space.shapes)
  narrow = functools.partial(_narrow, trainer)
  seed: PyTree = ()
  if trainer.projection.keep_seed or room is not None:
    seed = _placed(narrow(trained), shardings)
  if room is not None:
    params = jax.eval_shape(
      functools.partial(narrow_lib.held, room=room), trained, seed
    )
    everywhere = jax.tree.map(lambda _: partitioner.replicated, params)
    placed = placed._replace(params=_placed(params, everywhere))
  key = jax.eval_shape(lambda: jax.random.key(0))
  axes: Any = nn.logical_to_mesh_axes(('batch', None), partitioning.RULES)
  rows = NamedSharding(partitioner.mesh, axes)
  return Step(
    placed,
    trainer_lib.Constants(
      seed=seed,
      frozen=_placed(narrow(frozen), parts.select(space.shardings, frozen))
      if frozen
      else (),
    ),
    {
      name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows)
      for name, shape in batch.items()
    },
    _placed(key, partitioner.replicated),
    jax.ShapeDtypeStruct((), jnp.bool_, sharding=partitioner.replicated),
  )


def _narrow(trainer: trainer_lib.Trainer, shapes: PyTree) -> PyTree:
  """Returns the shapes of a seed's parameters in SEED_DTYPE."""
  fixed = trainer.network.adapter.fixed

  def narrow(path: Any, x: Any) -> Any:
    if fixed and re.fullmatch(fixed, tree_paths.path_of(path)):
      return x
    return jax.ShapeDtypeStruct(x.shape, jnp.dtype(trainer.seed_dtype))

  return jax.tree_util.tree_map_with_path(narrow, shapes)


def count(trainer: trainer_lib.Trainer, step: Step, mesh: Any) -> Memory:
  """Counts the arrays of a step.

  Args:
    trainer: network and method.
    step: the step's arguments.
    mesh: the partitioner's mesh.
  """
  params, theta = _bytes(step.state.params), _bytes(_theta(step))
  is_dense = trainer.projection.acts_after_step
  # Of a list, all of θ is made for the gradient, and made anew after it.
  made = 0 if isinstance(step.state.params, dict) else theta
  return Memory(
    parameters=params,
    frozen=_bytes(step.constants.frozen),
    seed=_bytes(step.constants.seed),
    optimizer=_bytes(step.state) - params,
    gradients=made + int((_AT_ONCE if is_dense else _AT_ONCE_OF_LISTS) * theta),
    # XLA makes the second one before the backward pass ends, unless that is a
    # loop over stacked layers.
    activations=(1 if trainer.network.scan_layers else 2) * made
    + _activations(trainer, step, mesh)
    + _first_gradients(trainer.network, step)
    + _gathered(step),
  )


def _theta(step: Step) -> PyTree:
  """Returns the shapes of θ with shardings, also where θ is a list."""
  if isinstance(step.state.params, dict):
    return step.state.params
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding),
    step.constants.seed,
  )


def _first_gradients(network: api.Network, step: Step) -> int:
  """Returns the bytes of gradients that exist before activations are freed."""
  params = parts.flatten(_theta(step))
  output = _bytes(_output_matrix(network, params))
  first = _bytes(params) if network.scan_layers else output
  # A tied table has two gradients, which are added at the end.
  return first if network.output_matrix else first + output


def _output_matrix(network: api.Network, params: dict[str, Any]) -> list[Any]:
  """Returns the trained matrix that gives the logits, if there is one."""
  if network.output_matrix:
    return [x for path, x in params.items() if path == network.output_matrix]
  rows = (network.vocab_size,)
  return [x for x in params.values() if x.shape[:1] == rows]


def _gathered(step: Step) -> int:
  """Returns the bytes of the largest matrix that is gathered for its use."""
  whole = parts.join(_theta(step), step.constants.frozen or {})
  largest = 0
  for path, x in parts.flatten(whole).items():
    mesh, axes = x.sharding.mesh, x.sharding.spec
    if mesh.shape[partitioning.FSDP] > 1 and partitioning.FSDP in axes:
      kept = (None if axis == partitioning.FSDP else axis for axis in axes)
      used = NamedSharding(mesh, PartitionSpec(*kept))
      _, slices = tree_paths.slice_paths(path, x.shape)
      largest = max(largest, _bytes(_placed(x, used)) // len(slices))
  return largest


class Compiled(NamedTuple):
  """XLA's plan.

  Attributes:
    memory: bytes of arguments and temporaries on one device.
    collectives: collectives of the projection alone.
  """

  memory: int
  collectives: list[collectives.Collective]


def compiled(
  trainer: trainer_lib.Trainer, step: Step, is_for_cpu: bool = True
) -> Compiled:
  """Compiles a step, and the projection alone, for the mesh's devices.

  Args:
    trainer: network and method.
    step: the step's arguments.
    is_for_cpu: whether the plan is for running on a CPU. If False, it stands
      for an accelerator's plan and uses no libraries for CPUs.
  """
  lowered = jax.jit(trainer.train_step, donate_argnums=0).lower(*step)
  options: Any = None if is_for_cpu else _AS_FOR_ACCELERATORS
  plan: Any = lowered.compile(compiler_options=options).memory_analysis()
  sent = []
  if trainer.projection.keep_seed and step.constants.seed:
    theta = _theta(step)
    tuning = methods.Tuning(theta, (), step.state.projection_state)
    seed = step.constants.seed if trainer.projection.widens_seed else theta
    apply = jax.jit(trainer.projection.settle).lower(
      tuning, seed, step.state.step
    )
    sent = collectives.find_all(apply.compile().as_text() or '')
  return Compiled(plan.argument_size_in_bytes + plan.temp_size_in_bytes, sent)


def _activations(trainer: trainer_lib.Trainer, step: Step, mesh: Any) -> int:
  """Returns the bytes of what the forward pass keeps for the backward pass.

  One device has its share of the network and of the batch: its rows of a
  microbatch, its heads, hidden units and logits. The result is the size of the
  residuals and of the gradient of the logits, which exists before any residual
  is freed.
  """
  model = mesh.shape[partitioning.MODEL]
  groups = mesh.size // model
  batch = {
    name: jax.ShapeDtypeStruct(
      (math.ceil(x.shape[0] / trainer.microbatches / groups), *x.shape[1:]),
      x.dtype,
    )
    for name, x in step.batch.items()
  }
  network = trainer.network.share(model)
  fused = _FUSED_AROUND_LAYERS if network.remat else _FUSED

  def kept(network: api.Network) -> int:
    return _kept(dataclasses.replace(trainer, network=network), batch, fused)

  rows, length = jax.eval_shape(network.targets, batch).tokens.shape
  logits = rows * length * network.vocab_size * np.dtype(np.float32).itemsize
  trained = parts.flatten(trainer.split(api.shapes(network))[0])
  if not network.output_matrix and _output_matrix(network, trained):
    logits *= 2  # XLA transposes their gradient for that of the tied table.
  if not network.remat:
    return kept(network) + logits
  one, two = (kept(network.with_remat(False, layers=n)) for n in (1, 2))
  inputs = kept(network) - kept(network.with_remat(True, layers=1))
  # What surrounds the layers is freed before the last layer is recomputed.
  layer, rest = two - one, 2 * one - two
  return inputs + max(rest + logits, layer)


def _kept(
  trainer: trainer_lib.Trainer, batch: dict[str, Any], fused: frozenset[str]
) -> int:
  """Returns the bytes of the residuals of a batch's loss.

  Args:
    trainer: network and method.
    batch: feature -> [batch, length] on one device.
    fused: operations whose results are not kept.
  """
  shapes = api.shapes(trainer.network)
  trained, frozen = trainer.split(shapes)
  frozen = _narrow(trainer, frozen)

  def backward(params: PyTree, rest: PyTree, batch: Any, key: Any) -> Any:
    def loss(params: PyTree) -> jax.Array:
      whole = parts.join(params, narrow_lib.for_network(rest))
      sums = losses.forward(trainer.network, trainer.loss, whole, batch, key)
      return sums.loss

    # With recomputed layers, the network itself decides what is kept.
    if not trainer.network.remat:
      loss = jax.checkpoint(
        loss, policy=lambda primitive, *_, **__: primitive.name not in fused
      )
    return jax.vjp(loss, params)[1]

  key = jax.eval_shape(lambda: jax.random.key(0))
  kept = jax.eval_shape(backward, trained, frozen, batch, key)
  # The residuals include parameters, which are counted elsewhere.
  known = Counter(
    (x.shape, x.dtype) for x in jax.tree.leaves((trained, frozen))
  )
  total = 0
  for x in jax.tree.leaves(kept):
    if known[x.shape, x.dtype]:
      known[x.shape, x.dtype] -= 1
    elif not jax.dtypes.issubdtype(x.dtype, jax.dtypes.extended):
      total += x.size * x.dtype.itemsize
  return total


def _placed(tree: PyTree, shardings: PyTree) -> PyTree:
  return jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=sharding
    ),
    tree,
    shardings,
  )


def _bytes(tree: PyTree) -> int:
  """Returns the size of abstract arrays on one device, in bytes."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * np.dtype(x.dtype).itemsize
    for x in jax.tree.leaves(tree)
  )
