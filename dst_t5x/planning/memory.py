"""Bytes that a training step needs on one device: counted, and compiled.

Two estimates of the same thing. `count` counts arrays: it traces the network,
which takes seconds. `compiled` asks XLA, which takes up to minutes; the answer
is its plan for a CPU, other compilers fuse and order otherwise. Neither
allocates anything.
"""

from collections import Counter
import dataclasses
import math
from typing import Any, NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
import numpy as np

from dst_t5x.core import parts
from dst_t5x.engine import parameters
from dst_t5x.engine import partitioning
from dst_t5x.engine import trainer as trainer_lib
from dst_t5x.models import api
from dst_t5x.planning import collectives

PyTree = Any


# What compilers fuse into its uses rather than keep: dropout's choice among
# them, products, and the comparison that makes the targets one-hot.
_FUSED = frozenset(
  [
    *('select_n', 'mul', 'eq', 'iota', 'convert_element_type'),
    *('broadcast_in_dim', 'transpose', 'reshape', 'squeeze', 'expand_dims'),
  ]
)
# Gradients, updates and new parameters, in parameters: some take the places of
# others. XLA plans 2.3 to 3.
_AT_ONCE = 2.5
# YNNPACK multiplies matrices on CPUs. Nothing is fused with what it takes from
# 4,096 rows on, and constants are written out in full: half as much again.
_NO_YNNPACK = {'xla_cpu_experimental_ynn_fusion_type': ''}


class Step(NamedTuple):
  """The abstract arguments of `Trainer.train_step`, with shardings."""

  state: trainer_lib.TrainState
  fixed: trainer_lib.Fixed
  batch: dict[str, Any]
  dropout_key: Any
  report: Any


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes on one device.

  Attributes:
    parameters: those that are trained.
    frozen: those that are not.
    seed: θ⁰, where the projection keeps it.
    optimizer: its state, and the projection's.
    gradients: gradients, updates and new parameters: what there is of them at
      once, after the backward pass.
    activations: what the forward pass keeps for the backward pass; and the
      gradient of the output matrix, or where layers are stacked all gradients,
      which there are from its start.
  """

  parameters: int
  frozen: int
  seed: int
  optimizer: int
  gradients: int
  activations: int

  @property
  def total(self) -> int:
    """What is needed at once: activations are gone when updates come."""
    lasting = self.parameters + self.frozen + self.seed + self.optimizer
    return lasting + max(self.gradients, self.activations)


def abstract_step(
  trainer: trainer_lib.Trainer,
  partitioner: partitioning.Partitioner,
  batch: dict[str, tuple[int, int]],
) -> Step:
  """Returns what a step is called with; for use under `activate`.

  Args:
    trainer: network and method.
    partitioner: the mesh.
    batch: feature of the model -> [batch, length].
  """
  space = parameters.ParameterSpace(trainer.network, partitioner)
  trained, frozen = trainer.split(space.shapes)
  shardings = parts.select(space.shardings, trained)
  state = jax.eval_shape(trainer.init, trained)
  key = jax.eval_shape(lambda: jax.random.key(0))
  axes: Any = nn.logical_to_mesh_axes(('batch', None), partitioning.RULES)
  rows = NamedSharding(partitioner.mesh, axes)
  params = _placed(trained, shardings)
  return Step(
    _placed(state, partitioner.like_parameters(state, trained, shardings)),
    trainer_lib.Fixed(
      seed=params if trainer.projection.keep_seed else (),
      frozen=_placed(frozen, parts.select(space.shardings, frozen))
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


def count(trainer: trainer_lib.Trainer, step: Step, mesh: Any) -> Memory:
  """Counts a step's arrays.

  Args:
    trainer: network and method.
    step: its arguments.
    mesh: of the partitioner.
  """
  params = _bytes(step.state.params)
  activations = _activations(trainer, step, mesh)
  # Gradients that are there before any activation is gone.
  network = trainer.network
  last = parts.flatten(step.state.params).get(network.output_matrix or '', ())
  activations += params if network.scan_layers else _bytes(last)
  return Memory(
    parameters=params,
    frozen=_bytes(step.fixed.frozen),
    seed=_bytes(step.fixed.seed),
    optimizer=_bytes(step.state) - params,
    gradients=int(_AT_ONCE * params),
    activations=activations,
  )


class Compiled(NamedTuple):
  """What XLA plans.

  Attributes:
    memory: bytes on one device, arguments and temporaries.
    collectives: what the devices send each other in the projection alone.
  """

  memory: int
  collectives: list[collectives.Sent]


def compiled(
  trainer: trainer_lib.Trainer, step: Step, is_for_cpu: bool = True
) -> Compiled:
  """Compiles a step, and the projection alone, for the mesh's devices.

  Args:
    trainer: network and method.
    step: its arguments.
    is_for_cpu: whether the plan is wanted as a CPU has it, libraries of its own
      included, or stands for an accelerator's.
  """
  lowered = jax.jit(trainer.train_step, donate_argnums=0).lower(*step)
  options: Any = None if is_for_cpu else _NO_YNNPACK
  plan: Any = lowered.compile(compiler_options=options).memory_analysis()
  sent = []
  if step.fixed.seed:
    apply = jax.jit(trainer.projection.apply).lower(
      step.state.params, step.fixed.seed, step.state.projection_state
    )
    sent = collectives.sent(apply.compile().as_text() or '')
  return Compiled(plan.argument_size_in_bytes + plan.temp_size_in_bytes, sent)


def _activations(trainer: trainer_lib.Trainer, step: Step, mesh: Any) -> int:
  """Returns bytes of what the backward pass needs of the forward pass.

  They are what differentiating one device's share of the network leaves: its
  rows of a microbatch, its heads, hidden units and logits; and the gradient of
  the logits, which is there before anything is gone. Layers that are recomputed
  leave their inputs, and one of them at a time all else.
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

  def kept(network: api.Network, is_fused: bool) -> int:
    share_of_it = dataclasses.replace(trainer, network=network)
    return _kept(share_of_it, batch, is_fused)

  rows, length = jax.eval_shape(network.targets, batch).tokens.shape
  logits = rows * length * network.vocab_size * np.dtype(np.float32).itemsize
  total = kept(network, not network.remat) + logits
  if network.remat:
    one = [network.with_remat(remat, layers=1) for remat in (False, True)]
    total += kept(one[0], False) - kept(one[1], False)
  return total


def _kept(
  trainer: trainer_lib.Trainer, batch: dict[str, Any], is_fused: bool
) -> int:
  """Returns bytes of what differentiating the loss of a batch leaves."""
  shapes = api.shapes(trainer.network)
  trained, frozen = trainer.split(shapes)

  def backward(params: PyTree, rest: PyTree, batch: Any, key: Any) -> Any:
    def loss(params: PyTree) -> jax.Array:
      whole = parts.join(params, rest)
      sums = trainer_lib.forward(
        trainer.network, trainer.loss, whole, batch, key
      )
      return sums.loss

    # Where layers are recomputed, the network says what is kept.
    if is_fused:
      loss = jax.checkpoint(loss, policy=_is_kept)
    return jax.vjp(loss, params)[1]

  key = jax.eval_shape(lambda: jax.random.key(0))
  kept = jax.eval_shape(backward, trained, frozen, batch, key)
  # Parameters are among it; they are counted elsewhere.
  known = Counter((x.shape, x.dtype) for x in jax.tree.leaves(shapes))
  total = 0
  for x in jax.tree.leaves(kept):
    if known[x.shape, x.dtype]:
      known[x.shape, x.dtype] -= 1
    elif not jax.dtypes.issubdtype(x.dtype, jax.dtypes.extended):
      total += x.size * x.dtype.itemsize
  return total


def _is_kept(primitive: Any, *_: Any, **__: Any) -> bool:
  return primitive.name not in _FUSED


def _placed(tree: PyTree, shardings: PyTree) -> PyTree:
  return jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=sharding
    ),
    tree,
    shardings,
  )


def _bytes(tree: PyTree) -> int:
  """Returns the bytes of abstract arrays on one device."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * np.dtype(x.dtype).itemsize
    for x in jax.tree.leaves(tree)
  )
