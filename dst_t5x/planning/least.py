"""The least that the devices of a mesh send in a training step.

  gradients    each is summed once over the devices that have different rows:
               reduced and scattered over those that share its parameter, then
               summed over the others
  parameters   a matrix that devices with different rows share is gathered
               twice, forward and backward; a table is looked up where it lies
  activations  where devices share the work of a row, the result of each matrix
               whose inputs are divided is summed forward, and as much backward:
               the gradient of the inputs of those before it
  recomputed   the former again, if layers are recomputed, but for the last
               matrix of a layer: nothing in the layer depends on its result

Each in the type of the computation, by the usual algorithms; see
`collectives.sent`.
"""

import collections
from collections.abc import Mapping
import re
from typing import Any

import numpy as np

from dst_t5x.core import parts
from dst_t5x.core import tree_paths
from dst_t5x.engine import parameters
from dst_t5x.engine import partitioning
from dst_t5x.models import api
from dst_t5x.planning import programs

GRADIENTS, PARAMETERS = 'gradients', 'parameters'
ACTIVATIONS, RECOMPUTED = 'activations', 'recomputed'
# Modules up to the layer: matrices of which one is the layer's last.
_LAYER = re.compile(rf'(.*/)?{tree_paths.STACK}(_\d+)?/')


def least(
  program: programs.Program, feature_lengths: Mapping[str, int]
) -> dict[str, float]:
  """Returns cause -> bytes that a device sends at least in a training step.

  Args:
    program: a training step.
    feature_lengths: the lengths of the task's features.
  """
  network, partitioner = program.trainer.network, program.partitioner
  shape = partitioner.mesh.shape
  model = shape[partitioning.MODEL]
  space = parameters.ParameterSpace(network, partitioner)
  trained = parts.flatten(program.trainer.split(space.shapes)[0])
  shardings = parts.flatten(space.shardings)
  rows = program.rows // partitioner.groups
  sent = dict.fromkeys((GRADIENTS, PARAMETERS, ACTIVATIONS, RECOMPUTED), 0.0)
  layers: dict[str, list[float]] = collections.defaultdict(list)
  for path, leaf in parts.flatten(space.shapes).items():
    axes = shardings[path].spec
    dtype = _dtype(network, path)
    size = leaf.size * np.dtype(dtype).itemsize
    if partitioning.MODEL in axes:
      size /= model
    shared = shape[partitioning.FSDP] if partitioning.FSDP in axes else 1
    if path in trained:
      sent[GRADIENTS] += _divided(size, shared)
      left = size / shared
      sent[GRADIENTS] += 2 * _divided(left, partitioner.groups // shared)
    if path.endswith('/kernel') or _is_output(network, path):
      sent[PARAMETERS] += 2 * _divided(size, shared)
    layer = _LAYER.match(path)
    if layer and path.endswith('/kernel') and axes[-2] == partitioning.MODEL:
      tokens = rows * _tokens(network, path, leaf, feature_lengths)
      # One for each row of the matrix and each layer of a stack.
      results = tokens * size * model / leaf.shape[-2]
      layers[layer[0]].append(2 * _divided(results, model))
  for sums in layers.values():
    sent[ACTIVATIONS] += 2 * sum(sums)
    if network.remat:
      sent[RECOMPUTED] += sum(sums) - max(sums)
  return sent


def _divided(size: float, devices: int) -> float:
  """Returns what a device sends to gather or to scatter an array."""
  return size * (devices - 1) / devices


def _is_output(network: api.Network, path: str) -> bool:
  if network.output_matrix:
    return path == network.output_matrix
  return path.endswith('/embedding')


def _dtype(network: api.Network, path: str) -> Any:
  """Returns the type of a parameter's gradient, and of what is gathered."""
  if path.endswith('/kernel') and not _is_output(network, path):
    return network.activation_dtype
  return np.float32


def _tokens(
  network: api.Network,
  path: str,
  leaf: Any,
  feature_lengths: Mapping[str, int],
) -> float:
  """Returns the number of tokens of a row that a matrix multiplies."""
  with_it = network.work_of_example({path: leaf}, feature_lengths).products
  without = network.work_of_example({}, feature_lengths).products
  return (with_it - without) / leaf.size
