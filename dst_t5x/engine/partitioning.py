"""Device mesh and shardings, from T5X's logical axis names.

The mesh has three axes:

  data   devices with a copy of the parameters and different rows of the batch
  fsdp   devices with different rows, which share one copy of the parameters
         (fully sharded data parallelism, ZeRO-3); a layer is gathered when it
         is needed
  model  devices that share the copy and the work of each row; matrices are
         divided (Megatron)

Gradients, seed and moments are sharded as their parameter is.
"""

from collections.abc import Mapping
import contextlib
import dataclasses
import functools
import math
from typing import Any, NamedTuple

from flax import linen as nn
from flax.linen import partitioning as nn_partitioning
import jax
from jax.experimental import mesh_utils
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

from dst_t5x.core import tree_paths
from dst_t5x.core import values
from dst_t5x.core.errors import UserError
from dst_t5x.method import masks

PyTree = Any

DATA, FSDP, MODEL = 'data', 'fsdp', 'model'
# The axes that divide a batch.
ROWS = (DATA, FSDP)
# T5X's standard rules, except that `embed` is divided by an axis of its own.
# In activations, the rows use that axis, and `embed` is not divided.
RULES = (
  ('batch', ROWS),
  ('vocab', MODEL),
  ('mlp', MODEL),
  ('heads', MODEL),
  ('joined_kv', MODEL),
  ('embed', FSDP),
  ('kv', None),
  ('length', None),
  ('relpos_buckets', None),
  ('layers', None),
  ('lora_rank', None),
  ('prompt', None),
)
# Bytes for each float32 parameter; training has θ, θ⁰, the gradient and θ′.
IN_TRAINING, IN_EVALUATION = 16, 4
# Share of a device's memory for parameters; the rest is for activations.
_SHARE = 0.5
# Assumed bytes of memory of a device that does not report them.
_ASSUMED = 16 * 2**30


class Host(NamedTuple):
  """The devices of a process.

  Attributes:
    devices: number of devices.
    memory: bytes of memory of each.
  """

  devices: int
  memory: int


@dataclasses.dataclass(frozen=True)
class Partitioner:
  """A data × fsdp × model mesh over all devices of all processes.

  Attributes:
    model_parallelism: size of the axis `model`. None lets `fitted` choose it;
      until then it is 1.
    fsdp: size of the axis `fsdp`; None has the same meaning. The axis `data`
      has the remaining devices.

  Raises:
    UserError: the devices cannot be divided in this way.
  """

  model_parallelism: values.Positive | None = None
  fsdp: values.Positive | None = None

  def __post_init__(self) -> None:
    devices = jax.device_count()
    for name in ('model_parallelism', 'fsdp'):
      size = getattr(self, name)
      if size is not None and (size < 1 or devices % size):
        raise UserError(
          f'{devices} device(s) cannot be divided into groups of '
          f'{name} = {size}'
        )
    model, fsdp = self._shape[2], self._shape[1]
    if devices % (model * fsdp):
      raise UserError(
        f'{devices} device(s) cannot be divided into groups of '
        f'model_parallelism · fsdp = {model} · {fsdp}'
      )

  @property
  def _shape(self) -> tuple[int, int, int]:
    fsdp, model = self.fsdp or 1, self.model_parallelism or 1
    return jax.device_count() // (fsdp * model), fsdp, model

  def fitted(
    self, parameters: int, bytes_each: int, host: 'Host | None' = None
  ) -> 'Partitioner':
    """Returns a partitioner with all sizes chosen.

    As few devices as possible share a copy of the parameters: a device's part
    of it, with gradients and seed, may take half of its memory. Within a
    process, where links are fastest, devices divide matrices (`model`). Further
    division is among processes (`fsdp`).

    Args:
      parameters: number of parameters of the model.
      bytes_each: IN_TRAINING or IN_EVALUATION.
      host: the devices of a process; by default those of this one.
    """
    host = host or Host(jax.local_device_count(), _memory())
    devices = jax.device_count()
    fsdp, model = self.fsdp, self.model_parallelism
    if fsdp is None or model is None:
      room = _SHARE * host.memory
      known = (fsdp or 1) * (model or 1)
      sharing = next(
        (
          known * n
          for n in range(1, devices // known + 1)
          if devices % (known * n) == 0
          and parameters * bytes_each <= room * known * n
        ),
        devices,
      )
      if model is None and fsdp is None:
        model = math.gcd(sharing, host.devices)
      model = sharing // (fsdp or 1) if model is None else model
      fsdp = sharing // model if fsdp is None else fsdp
    return Partitioner(model, fsdp)

  @functools.cached_property
  def mesh(self) -> Mesh:
    """The mesh; neighbours on `model` are neighbours on the network."""
    devices = mesh_utils.create_device_mesh(
      self._shape, allow_split_physical_axes=True
    )
    return Mesh(devices, (DATA, FSDP, MODEL))

  def __str__(self) -> str:
    """Returns `data 2 × fsdp 2 × model 1`."""
    sizes = zip((DATA, FSDP, MODEL), self._shape, strict=True)
    return ' × '.join(f'{name} {size}' for name, size in sizes)

  @contextlib.contextmanager
  def activate(self) -> Any:
    """Makes the network's logical axis names refer to this mesh."""
    with jax.set_mesh(self.mesh), nn_partitioning.axis_rules(RULES):
      yield

  @property
  def groups(self) -> int:
    """The number of parts that a batch is divided into."""
    return self._shape[0] * self._shape[1]

  def check_batch_size(
    self, batch_size: int, microbatches: int = 1, name: str = 'BATCH_SIZE'
  ) -> None:
    """Raises UserError if a batch or microbatch cannot be divided evenly."""
    rows = batch_size // microbatches
    if rows % self.groups:
      what = name if microbatches == 1 else f'{name} / MICROBATCHES'
      raise UserError(
        f'{what} = {rows} is not a multiple of the {self.groups} groups of '
        f'devices that split it{self._remedy(rows)}'
      )

  def _remedy(self, rows: int) -> str:
    """Returns the smallest model parallelism that would work, as a remedy."""
    devices = jax.device_count()
    for model in range(1, devices + 1):
      if devices % model == 0 and rows % (devices // model) == 0:
        return f'; with MODEL_PARALLELISM = {model} it would be'
    return ''

  def round_up(self, batch_size: int) -> int:
    """Returns the smallest batch size from this one on that divides evenly."""
    return -(-batch_size // self.groups) * self.groups

  @property
  def replicated(self) -> NamedSharding:
    """The sharding of an array with a copy on every device."""
    return NamedSharding(self.mesh, PartitionSpec())

  @property
  def rows(self) -> NamedSharding:
    """The sharding of a batch on its first axis."""
    return NamedSharding(self.mesh, PartitionSpec(ROWS))

  def key(self, random_seed: int) -> jax.Array:
    """Returns a PRNG key on all devices."""
    make = jax.jit(
      jax.random.key, static_argnums=0, out_shardings=self.replicated
    )
    return make(random_seed)

  def parameters(self, axes: PyTree, shapes: PyTree) -> PyTree:
    """Returns the sharding of each parameter.

    An axis whose size is not a multiple of the devices is not divided, for
    example six heads on four devices.

    Args:
      axes: the network's `params_axes` collection.
      shapes: tree of jax.ShapeDtypeStruct.
    """
    names = nn_partitioning.get_axis_names(axes)
    shardings = _plain(nn.logical_to_mesh_sharding(names, self.mesh, RULES))

    return jax.tree.map(self._even, shapes, shardings)

  def _even(self, leaf: Any, sharding: NamedSharding) -> NamedSharding:
    """Returns the sharding without the axes that do not divide a leaf."""
    spec = [
      axis if axis and size % _size(self.mesh, axis) == 0 else None
      for size, axis in zip(leaf.shape, sharding.spec, strict=False)
    ]
    return NamedSharding(self.mesh, PartitionSpec(*spec))

  def like_parameters(
    self, tree: PyTree, params: PyTree, shardings: PyTree
  ) -> PyTree:
    """Returns the sharding of each leaf of a training state.

    A leaf is sharded as a parameter if its path ends in the parameter's path
    and it has the parameter's shape or packs a mask of it. The longest such
    path counts. All other leaves are replicated: counts, and the vectors of
    factored moments.

    `optax.tree_map_params` cannot replace this. It calls the optimizer's `init`
    with a placeholder, but the structure of `optimizers.adafactor`'s state
    depends on which parameters are stacked. Nor does it see the state of a
    method.

    Args:
      tree: abstract training state, or a part of it.
      params: abstract parameters.
      shardings: shardings of the parameters.
    """
    by_path: Mapping[str, tuple[tuple[int, ...], NamedSharding]] = {
      _path(key_path): (leaf.shape, sharding)
      for (key_path, leaf), sharding in zip(
        jax.tree_util.tree_leaves_with_path(params),
        jax.tree.leaves(shardings),
        strict=True,
      )
    }

    def sharding(key_path: Any, leaf: Any) -> NamedSharding:
      path = _path(key_path)
      while path:  # Drops the first name until the rest is a parameter's path.
        shape, parameter_sharding = by_path.get(path, (None, self.replicated))
        if shape == leaf.shape:
          return parameter_sharding
        if shape is not None and masks.is_packed(leaf, shape):
          return self._even(leaf, parameter_sharding)
        rest = path[1:].partition('/')[2]
        path = rest and f'/{rest}'
      return self.replicated

    return jax.tree_util.tree_map_with_path(sharding, tree)

  def rows_here(self, batch_size: int) -> np.ndarray:
    """Returns bool [batch_size]: the rows that devices of this process need."""
    needed = np.zeros(batch_size, bool)
    shape = (batch_size,)
    for index in self.rows.addressable_devices_indices_map(shape).values():
      needed[index] = True
    return needed

  def place_batch(self, batch: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Puts a batch on the devices.

    Args:
      batch: name -> [batch, …], the batch of all processes. A process uses only
        the rows of `rows_here`.
    """
    return {name: place(value, self.rows) for name, value in batch.items()}


def place(value: np.ndarray, sharding: NamedSharding) -> jax.Array:
  """Puts an array that every process has on the devices.

  Unlike `jax.device_put`, it does not compare the array among processes.
  """
  return jax.make_array_from_callback(value.shape, sharding, value.__getitem__)


def _memory() -> int:
  """Returns a device's memory in bytes."""
  stats = jax.local_devices()[0].memory_stats() or {}
  return stats.get('bytes_limit', _ASSUMED)


def _size(mesh: Mesh, axis: str | tuple[str, ...]) -> int:
  names = (axis,) if isinstance(axis, str) else axis
  return math.prod(mesh.shape[name] for name in names)


def _path(key_path: Any) -> str:
  return '/' + tree_paths.path_of(key_path)


def _plain(tree: Any) -> Any:
  """Returns nested plain dicts, the form of parameters."""
  if isinstance(tree, Mapping):
    return {key: _plain(value) for key, value in tree.items()}
  return tree
