"""Makes T5X's trainer without gin, for a user's own training loop."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from t5x import adafactor
from t5x import optimizers
from t5x import partitioning
from t5x import utils

from dst_t5x.method import api as methods
from dst_t5x.t5x import checkpointer
from dst_t5x.t5x import model as model_lib
from dst_t5x.t5x import optimizer as optimizer_lib
from dst_t5x.t5x import trainer as trainer_lib


def logical_axis_rules() -> Any:
  """Returns T5X's rules, extended to adapters' axes."""
  added = [(axis, None) for axis in optimizer_lib.ADDED_AXES]
  return partitioning.standard_logical_axis_rules(additional_rules=added)


def trainer(
  network: Any,
  projection: methods.Projection,
  task: str,
  seed: str,
  batch: Mapping[str, Any],
  learning_rate: Callable[[jax.Array], Any],
  partitioner: partitioning.BasePartitioner | None = None,
  inner: optimizers.OptimizerDef | None = None,
) -> trainer_lib.SubsetTrainer:
  """Returns the trainer before the first step.

  Args:
    network: a network of this package, or T5X's own.
    projection: the method.
    task: the task whose vocabularies the model has.
    seed: the seed's path, see `seeds.load_seed`.
    batch: features [batch, length]; all batches must have their shapes.
    learning_rate: step -> learning rate.
    partitioner: a partitioner of T5X; by default each device has all
      parameters.
    inner: an optimizer of T5X; AdaFactor by default.

  Raises:
    SystemExit: the seed cannot be loaded, or does not fit the network.
  """
  partitioner = partitioner or partitioning.PjitPartitioner(
    num_partitions=1, logical_axis_rules=logical_axis_rules()
  )
  inner = inner or adafactor.Adafactor(
    logical_factor_rules=optimizer_lib.logical_factor_rules()
  )
  optimizer = optimizer_lib.SubsetOptimizer(inner, network, projection)
  lengths = {'targets': 1}  # Nothing is decoded.
  model = model_lib.model(network, task, lengths, optimizer)
  initializer = utils.TrainStateInitializer(
    optimizer,
    model.get_initial_variables,
    {name: x.shape for name, x in batch.items()},
    partitioner,
    {name: x.dtype for name, x in batch.items()},
  )
  reader = checkpointer.SeedCheckpointer(
    initializer.global_train_state_shape,
    partitioner,
    '',
    network=network,
    task=task,
    restore_dtype=jnp.dtype('float32'),
  )
  return trainer_lib.SubsetTrainer(
    train_state=reader.restore(path=seed),
    model=model,
    partitioner=partitioner,
    eval_names=(),
    summary_dir=None,
    train_state_axes=initializer.train_state_axes,
    rng=jax.random.PRNGKey(0),
    learning_rate_fn=learning_rate,
    num_microbatches=1,
  )
