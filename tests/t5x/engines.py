"""Runs both engines on the same batches from the same seed, step by step.

As a script, it runs T5X's engine on eight devices and prints JSON.
"""

import json
import sys
from typing import NamedTuple

import flax
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np
from t5x import partitioning
import toy_task

from dst_t5x.checkpoints import seeds
from dst_t5x.core import parts
from dst_t5x.data import pipeline
from dst_t5x.data import task_checks
from dst_t5x.engine import optimizers
from dst_t5x.engine import trainer as trainer_lib
from dst_t5x.method import projection as projection_lib
from dst_t5x.models.t5 import network as network_lib
from dst_t5x.t5x import loop

LENGTHS = {'inputs': 16, 'targets': 16}
STEPS = 20
# Of tests/toy.gin.
CONFIG = network_lib.T5Config(
  vocab_size=264,
  emb_dim=32,
  num_heads=2,
  num_encoder_layers=2,
  num_decoder_layers=1,
  head_dim=8,
  mlp_dim=48,
  mlp_activations=('gelu', 'linear'),
  dropout_rate=0.0,
)


def learning_rate(projection):
  """Returns the rate of gin/methods; larger ones amplify rounding errors."""
  return 0.01 if projection.constrains else 0.001


class Trace(NamedTuple):
  """The results of an engine.

  Attributes:
    losses: [steps].
    free: path -> bool, which components differ from the seed at the end.
    specs: name -> the partition spec of an array of the state.
  """

  losses: list[float]
  free: dict[str, np.ndarray]
  specs: dict[str, str]


class Partitioner(partitioning.PjitPartitioner):
  """T5X's partitioner, with a choice of mesh on CPUs too."""

  def __init__(self, data_parallelism: int, model_parallelism: int) -> None:
    super().__init__(
      num_partitions=model_parallelism,
      logical_axis_rules=loop.logical_axis_rules(),
    )
    shape = data_parallelism, model_parallelism
    devices = np.array(jax.devices()[: np.prod(shape)])
    self._chosen = Mesh(devices.reshape(shape), ('data', 'model'))

  @property
  def mesh(self) -> Mesh:
    return self._chosen


def batches():
  """Returns packed batches of the toy task, [batch, length] each."""
  task = task_checks.check(toy_task.NAME, LENGTHS, 16)
  converter = network_lib.Transformer(CONFIG).feature_converter(pack=True)
  with pipeline.TrainIterator(
    task, LENGTHS, 16, converter, random_seed=0
  ) as source:
    return [next(source).batch for _ in range(STEPS)]


def t5x(projection, seed, partitioner=None):
  """Trains in T5X."""
  partitioner = partitioner or Partitioner(1, 1)
  network = network_lib.Transformer(CONFIG)
  trainer = loop.trainer(
    network,
    projection,
    toy_task.NAME,
    str(seed),
    batches()[0],
    lambda step: learning_rate(projection),
    partitioner,
  )
  losses = []
  for batch in batches():
    with partitioner.mesh:
      state, metrics = trainer._partitioned_train_step(
        trainer.train_state, batch
      )
    trainer.train_state = state
    losses.append(float(metrics['cross_ent_loss'].compute()))
  trainer.close()
  optimizer = trainer.train_state._optimizer
  params = jax.device_get(flax.core.unfreeze(optimizer.target))
  specs = {
    name: str(x.sharding.spec)
    for name, x in parts.flatten(optimizer.state_dict()).items()
    if isinstance(x, jax.Array)
  }
  return Trace(losses, _free(params, seed), specs)


def ours(projection, seed):
  """Trains in our engine."""
  trainer = trainer_lib.Trainer(
    network_lib.Transformer(CONFIG),
    optimizers.adafactor(optimizers.schedule(learning_rate(projection))),
    projection,
  )
  params = jax.tree.map(jnp.asarray, seeds.load_seed(seed).params)
  state, constants = trainer.init(params), trainer_lib.Constants(seed=params)
  step = jax.jit(trainer.train_step)
  losses = []
  for batch in batches():
    key, report = jax.random.key(0), jnp.asarray(False)
    state, metrics = step(state, constants, batch, key, report)
    losses.append(float(metrics['loss']))
  return Trace(losses, _free(jax.device_get(state.params), seed), {})


def _free(params, seed):
  before = parts.flatten(seeds.load_seed(seed).params)
  return {
    path: x.view(np.uint32) != before[path].view(np.uint32)
    for path, x in parts.flatten(params).items()
  }


def shared(a, b):
  """Returns how many components are free in both, and in each."""
  both = sum(int(np.sum(a.free[path] & b.free[path])) for path in a.free)
  return both, *(sum(int(x.sum()) for x in t.free.values()) for t in (a, b))


if __name__ == '__main__':
  projection = projection_lib.SubsetProjection(epsilon=0.01)
  for shape in ((1, 1), (4, 2)):
    trace = t5x(projection, sys.argv[1], Partitioner(*shape))
    free = {p: np.flatnonzero(x).tolist() for p, x in trace.free.items()}
    row = {'losses': trace.losses, 'free': free, 'specs': trace.specs}
    print(json.dumps(row))
