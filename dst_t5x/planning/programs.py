"""The programs of training, evaluation and decoding, lowered for a mesh.

They are those that the commands compile, with abstract arguments: nothing is
allocated.
"""

from collections.abc import Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from dst_t5x.core import parts
from dst_t5x.engine import losses
from dst_t5x.engine import parameters
from dst_t5x.engine import partitioning
from dst_t5x.engine import sources
from dst_t5x.engine import trainer as trainer_lib
from dst_t5x.models import api
from dst_t5x.models import decoding
from dst_t5x.planning import memory

TRAINING, EVALUATION = 'training', 'evaluation'
GREEDY, BEAMS = 'greedy decoding', 'beam decoding'
ALL = (TRAINING, EVALUATION, GREEDY, BEAMS)
_WAYS = {
  GREEDY: decoding.GreedyDecoder(),
  BEAMS: decoding.BeamSearch(),
}
# Rows of evaluation and decoding, as gin/runs/train.gin has them.
_ROWS = 32


@dataclasses.dataclass(frozen=True)
class Program:
  """A program, and what it is a program of.

  Attributes:
    lowered: what `compile` compiles.
    trainer: network and method.
    partitioner: the mesh.
    batch: feature of the model -> [batch, length].
  """

  lowered: jax.stages.Lowered
  trainer: trainer_lib.Trainer
  partitioner: partitioning.Partitioner
  batch: api.Shapes

  @property
  def rows(self) -> int:
    """The number of rows of the batch, on all devices."""
    return next(iter(self.batch.values()))[0]


def lower(
  trainer: trainer_lib.Trainer,
  train_data: sources.TrainData,
  partitioner: partitioning.Partitioner,
  names: Sequence[str] = (TRAINING,),
  host: tuple[int, int] | None = None,
  layers: int | None = None,
) -> dict[str, Program]:
  """Returns name -> program.

  Args:
    trainer: network and method.
    train_data: batch size and lengths.
    partitioner: the mesh, which the whole network decides.
    names: of `ALL`.
    host: see `estimate.estimate`.
    layers: a number of layers, to compile a small part of the network; None for
      all layers.
  """
  partitioner = parameters.choose_mesh(
    trainer.network,
    partitioner,
    partitioning.IN_TRAINING,
    partitioning.Host(*host) if host else None,
  )
  if layers is not None:
    network = trainer.network.with_layers(layers)
    trainer = dataclasses.replace(trainer, network=network)
  lengths = train_data.feature_lengths
  programs = {}
  for name in names:
    is_training = name == TRAINING
    rows = train_data.batch_size if is_training else _ROWS
    batch = trainer.network.batch_shapes(
      lengths, partitioner.round_up(rows), is_training and train_data.pack
    )
    with partitioner.activate():
      step = memory.abstract_step(trainer, partitioner, batch)
      if is_training:
        lowered = _training(trainer, partitioner, step)
      elif name == EVALUATION:
        lowered = _evaluation(trainer, partitioner, step)
      else:
        lowered = _decoding(_WAYS[name], trainer, partitioner, step, lengths)
    programs[name] = Program(lowered, trainer, partitioner, batch)
  return programs


def _training(
  trainer: trainer_lib.Trainer,
  partitioner: partitioning.Partitioner,
  step: memory.Step,
) -> jax.stages.Lowered:
  """Lowers a step as `runs.session` makes it."""
  shardings = jax.tree.map(lambda x: x.sharding, step.state)
  return jax.jit(
    trainer.train_step,
    donate_argnums=0,
    out_shardings=(shardings, partitioner.replicated),
  ).lower(*step)


def _evaluation(
  trainer: trainer_lib.Trainer,
  partitioner: partitioning.Partitioner,
  step: memory.Step,
) -> jax.stages.Lowered:
  """Lowers the teacher-forced loss, as `engine.forced` computes it."""
  forward = functools.partial(losses.forward, trainer.network, losses.Loss())
  return jax.jit(forward, out_shardings=partitioner.replicated).lower(
    _whole(step), step.batch
  )


def _decoding(
  decoder: Any,
  trainer: trainer_lib.Trainer,
  partitioner: partitioning.Partitioner,
  step: memory.Step,
  lengths: Any,
) -> jax.stages.Lowered:
  """Lowers decoding, as `engine.evaluation` does it."""
  rows = next(iter(step.batch.values())).shape[0]
  # An adapter's prefix makes prompts longer.
  prompt = trainer.network.prompt_of_inputs(
    jnp.zeros(lengths['inputs'], jnp.int32)
  )

  def decode(params: Any, prompts: jax.Array) -> Any:
    return decoder(trainer.network, params, prompts, lengths['targets'])

  prompts = jax.ShapeDtypeStruct(
    (rows, len(prompt)), jnp.int32, sharding=partitioner.rows
  )
  return jax.jit(decode, out_shardings=partitioner.replicated).lower(
    _whole(step), prompts
  )


def _whole(step: memory.Step) -> Any:
  return parts.join(step.state.params, step.constants.frozen or {})
