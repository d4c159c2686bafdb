"""Starts T5X from a seed in any format that this package reads.

T5X restores by names, and can replace missing parameters by random ones. This
checkpointer reads all pretrained parameters and makes the state before the
first step from them: the seed is a copy of them, and the optimizer's moments
and the step are zero. Resuming a run uses T5X's own checkpointer.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import re
from typing import Any

import flax
import jax
from jax.sharding import NamedSharding
import numpy as np
import seqio
from t5x import checkpoints
from t5x import train_state as train_state_lib

from dst_t5x.checkpoints import matching
from dst_t5x.checkpoints import seeds
from dst_t5x.core import parts
from dst_t5x.core import stacking
from dst_t5x.core.errors import UserError
from dst_t5x.engine import parameters
from dst_t5x.engine import partitioning
from dst_t5x.models import api
from dst_t5x.t5x import optimizer as optimizer_lib

PyTree = Any


def of_a_step(path: str) -> str:
  """Returns the path, checked for `t5x.eval`.

  Raises:
    SystemExit: it does not end in a step. T5X would fail at the very end.
  """
  if not re.search(r'\d/?$', path):
    raise SystemExit(
      'error: t5x.eval takes a path that ends in checkpoint_<step>, not '
      f'{path}: write one with `python -m dst_t5x.convert {path} FOLDER '
      '--format=t5x`'
    )
  return path


class SeedCheckpointer(checkpoints.Checkpointer):
  """Restores a seed for training, or a tuned model for evaluation.

  Use it as `utils.RestoreCheckpointConfig.checkpointer_cls`, with
  use_orbax=False.
  """

  def __init__(
    self,
    train_state: train_state_lib.TrainState,
    *arguments: Any,
    network: api.Network,
    task: str | None = None,
    random_seed: int = 0,
    **options: Any,
  ) -> None:
    """Stores the arguments.

    Args:
      train_state: the shapes of the state to restore.
      *arguments: see `checkpoints.Checkpointer`.
      network: the model, with the method's adapter if it has one.
      task: the task whose vocabulary encodes an adapter's texts.
      random_seed: the seed of an adapter's initial parameters.
      **options: see `checkpoints.Checkpointer`.
    """
    self._network = network
    self._task = task
    self._random_seed = random_seed
    super().__init__(train_state, *arguments, **options)

  def restore(
    self,
    step: int | None = None,
    path: str | None = None,
    state_transformation_fns: Sequence[Any] = (),
    fallback_state: Mapping[str, Any] | None = None,
    lazy_parameters: bool = False,
  ) -> train_state_lib.TrainState:
    """Returns the state before the first step, or that of a tuned model.

    Args:
      step: not used.
      path: see `seeds.load_seed`.
      state_transformation_fns: must be empty.
      fallback_state: must be empty.
      lazy_parameters: not used.

    Raises:
      SystemExit: the seed cannot be loaded or does not fit this model, or an
        argument must be empty and is not.
    """
    del step, lazy_parameters
    try:
      if state_transformation_fns or fallback_state:
        raise UserError(
          'a seed is read as it is: leave assignment_map, '
          'state_transformation_fns and fallback_to_scratch out'
        )
      if isinstance(self._train_state, train_state_lib.InferenceState):
        return self._tuned(seeds.load_seed(path))
      return self._start(seeds.load_seed(path).merged())
    except UserError as error:
      raise SystemExit(f'error: {error}') from error

  def _tuned(self, found: seeds.Seed) -> train_state_lib.TrainState:
    """Returns the state of a model for evaluation."""
    # T5X's own checkpoints do not record their adapter.
    adapter = self._network.adapter
    if found.adapter.added and found.adapter != adapter:
      raise UserError(
        f'{found.path} has the adapter {found.adapter}, the network '
        f'{adapter}: give the gin file of its method, with the same settings'
      )
    params = self._like_network(self._checked(found, self._train_state.params))
    placed = self._place(params, self._axes().params)
    return self._train_state.restore_state(
      {'target': placed, 'state': {'step': np.int32(found.step)}}
    )

  def _start(self, seed: seeds.Seed) -> train_state_lib.TrainState:
    """Returns the state before the first step."""
    definition = self._train_state._optimizer.optimizer_def
    if not isinstance(definition, optimizer_lib.SubsetOptimizer):
      raise UserError(
        'SeedCheckpointer needs a SubsetOptimizer as OPTIMIZER, not a '
        f'{type(definition).__name__}: see gin/t5x/finetune.gin'
      )
    base = self._train_state.params
    if adapter := self._network.adapter.added:
      _, base = parts.split(base, [adapter])
    params = self._checked(seed, base)
    if adapter:
      added = parameters.initialize_added(
        self._network, params, self._random_seed, self._encode
      )
      params = parts.join(params, added)
    params = self._like_network(params)
    axes = self._axes()
    begin = self._partitioner.partition(
      definition.begin,
      in_axis_resources=(axes.params,),
      out_axis_resources=axes._optimizer,
    )
    with self._partitioner.mesh:
      optimizer = begin(self._place(params, axes.params))
    return self._train_state.replace(_optimizer=optimizer)

  def _axes(self) -> train_state_lib.TrainState:
    return self._partitioner.get_mesh_axes(self._train_state)

  def _encode(self, text: str) -> list[int]:
    features = seqio.get_mixture_or_task(self._task).output_features
    return features['targets'].vocabulary.encode(text)

  def _checked(self, seed: seeds.Seed, expected: PyTree) -> PyTree:
    """Checks a checkpoint; returns it with the adapter's fixed tensors."""
    expected = parameters.without_fixed(
      self._network, flax.core.unfreeze(expected)
    )
    # T5X's own checkpoints have the fixed tensors.
    params = parameters.without_fixed(self._network, seed.params)
    seed = dataclasses.replace(seed, params=params)
    expected = jax.eval_shape(stacking.unstack_layers, expected)
    matching.check(seed, self._network, expected)
    shapes = flax.core.unfreeze(self._train_state.params)
    return parameters.with_fixed(self._network, shapes, params)

  def _like_network(self, params: PyTree) -> PyTree:
    """Returns parameters with the network's structure."""
    if self._network.scan_layers:
      return stacking.stack_layers(params)
    return params

  def _place(self, params: PyTree, axes: PyTree) -> PyTree:
    """Returns host arrays on the devices, with the shardings of `axes`."""
    specs = parts.flatten(axes)
    placed = {
      path: partitioning.place(
        array, NamedSharding(self._partitioner.mesh, specs[path])
      )
      for path, array in parts.flatten(params).items()
    }
    return flax.core.freeze(parts.unflatten(placed))
