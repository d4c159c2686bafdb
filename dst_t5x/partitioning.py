"""Device mesh and shardings, from T5X's logical axis names."""

from collections.abc import Mapping
import contextlib
import dataclasses
from typing import Any

from flax import linen as nn
from flax.linen import partitioning as nn_partitioning
import jax
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

from dst_t5x.errors import UserError

PyTree = Any

DATA, MODEL = 'data', 'model'
# T5X's standard rules for one-dimensional parameter and activation sharding.
RULES = (
  ('batch', DATA),
  ('vocab', MODEL),
  ('mlp', MODEL),
  ('heads', MODEL),
  ('joined_kv', MODEL),
  ('embed', None),
  ('kv', None),
  ('length', None),
  ('relpos_buckets', None),
  ('layers', None),
  ('lora_rank', None),
  ('prompt', None),
)


@dataclasses.dataclass(frozen=True)
class Partitioner:
  """A data × model mesh over all devices.

  Attributes:
    model_parallelism: devices that share one copy of the parameters; the
      others split the batch.

  Raises:
    UserError: the devices cannot be divided so.
  """

  model_parallelism: int = 1

  def __post_init__(self) -> None:
    devices = jax.device_count()
    if self.model_parallelism < 1 or devices % self.model_parallelism:
      raise UserError(
        f'{devices} device(s) cannot be divided into groups of '
        f'model_parallelism = {self.model_parallelism}'
      )

  @property
  def mesh(self) -> Mesh:
    """The mesh, with axes `data` and `model`."""
    devices = np.asarray(jax.devices())
    return Mesh(devices.reshape(-1, self.model_parallelism), (DATA, MODEL))

  @contextlib.contextmanager
  def activate(self) -> Any:
    """Makes the network's logical axis names mean this mesh."""
    with jax.set_mesh(self.mesh), nn_partitioning.axis_rules(RULES):
      yield

  def check_batch_size(self, batch_size: int, name: str = 'BATCH_SIZE') -> None:
    """Raises UserError if a batch cannot be split evenly."""
    groups = jax.device_count() // self.model_parallelism
    if batch_size % groups:
      raise UserError(
        f'{name} = {batch_size} is not a multiple of the {groups} '
        'groups of devices that split it'
      )

  def round_up(self, batch_size: int) -> int:
    """Returns the least batch size from this one on that is split evenly."""
    groups = jax.device_count() // self.model_parallelism
    return -(-batch_size // groups) * groups

  @property
  def replicated(self) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(self.mesh, PartitionSpec())

  def parameters(self, axes: PyTree) -> PyTree:
    """Returns the sharding of each parameter.

    Args:
      axes: the network's `params_axes` collection.
    """
    names = nn_partitioning.get_axis_names(axes)
    shardings = nn.logical_to_mesh_sharding(names, self.mesh, RULES)
    return _plain(shardings)

  def like_parameters(
    self, tree: PyTree, params: PyTree, shardings: PyTree
  ) -> PyTree:
    """Returns shardings for what goes with the parameters.

    Args:
      tree: abstract optimizer state, say. A leaf under a parameter's path and
        of its shape is sharded like it; anything else is replicated, which
        is little: factored moments are vectors.
      params: abstract parameters.
      shardings: their shardings.
    """
    known: Mapping[str, tuple[tuple[int, ...], NamedSharding]] = {
      _path(key_path): (leaf.shape, sharding)
      for (key_path, leaf), sharding in zip(
        jax.tree_util.tree_leaves_with_path(params),
        jax.tree.leaves(shardings),
        strict=True,
      )
    }

    def sharding(key_path: Any, leaf: Any) -> NamedSharding:
      path = _path(key_path)
      for parameter, (shape, its_sharding) in known.items():
        if path.endswith(parameter) and leaf.shape == shape:
          return its_sharding
      return self.replicated

    return jax.tree_util.tree_map_with_path(sharding, tree)

  def place_batch(self, batch: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Puts this process's part of a batch on its devices."""
    sharding = NamedSharding(self.mesh, PartitionSpec(DATA))
    return {
      name: jax.make_array_from_process_local_data(sharding, value)
      for name, value in batch.items()
    }

  def place_whole_batch(
    self, batch: Mapping[str, np.ndarray]
  ) -> dict[str, Any]:
    """Puts a batch that every process holds as a whole on the devices."""
    sharding = NamedSharding(self.mesh, PartitionSpec(DATA))
    return {
      name: jax.make_array_from_callback(
        value.shape, sharding, value.__getitem__
      )
      for name, value in batch.items()
    }


def _path(key_path: Any) -> str:
  return '/' + jax.tree_util.keystr(key_path, simple=True, separator='/')


def _plain(tree: Any) -> Any:
  """Returns nested plain dicts, as parameters are."""
  if isinstance(tree, Mapping):
    return {key: _plain(value) for key, value in tree.items()}
  return tree
