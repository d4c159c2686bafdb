"""One forward pass in which every example has a subset of its own.

The big matrices are the seed's for all examples. Where a linear map y = xW is
applied, an example b adds x·(W_b - W), a sum over its few entries of W:

    y[b, :, column] += x[b, :, row] · (value - seed)

The same for the embeddings. Of what is small, such as the scales of norms,
every example has a tensor of its own; see `api.Network.own_tensors`.

Flax's `nn.intercept_methods` lets this be added from outside: the network
knows nothing of it.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dst_t5x.adapters import api as adapters
from dst_t5x.core import tree_paths
from dst_t5x.core.errors import UserError
from dst_t5x.models import api
from dst_t5x.models import decoding
from dst_t5x.serving import slots as slots_lib
from dst_t5x.subsets import on_device

Array = jax.Array
PyTree = Any


class Entries(NamedTuple):
  """What the subsets of a batch have in one matrix.

  Attributes:
    rows: int32 [batch, room].
    columns: int32 [batch, room].
    values: float32 [batch, room], the subset's; 0 where there is nothing.
    seeds: float32 [batch, room], the seed's; 0 where there is nothing.
  """

  rows: Array
  columns: Array
  values: Array
  seeds: Array

  def differences(self, dtype: Any) -> Array:
    """Returns float32 [batch, room], to the seed, of a matrix in a type."""
    values, seeds = (
      x.astype(dtype).astype(jnp.float32) for x in (self.values, self.seeds)
    )
    return values - seeds


class _Noting(dict[str, Any]):
  """A dict that notes which of its keys were used."""

  def __init__(self, content: Mapping[str, Any]) -> None:
    super().__init__(content)
    self.used: set[str] = set()

  def __getitem__(self, key: str) -> Any:
    self.used.add(key)
    return super().__getitem__(key)


class Corrections:
  """Changes a network's modules as the subsets of a batch want it."""

  def __init__(
    self,
    network: api.Network,
    tensors: on_device.Tensors,
    params: PyTree,
    subsets: on_device.Arrays,
    rooms: on_device.Rooms,
    slots: slots_lib.Slots,
  ) -> None:
    """Sorts entries by tensors.

    Args:
      network: whose modules are changed.
      tensors: of the seed.
      params: the seed.
      subsets: of each example, stacked on axis 0.
      rooms: of each tensor; large enough for each subset in one round.
      slots: those of the rooms.
    """
    spread = jax.vmap(lambda of: slots_lib.spread(of, slots))(subsets)
    spread = jax.lax.optimization_barrier(spread)
    begins = np.cumsum([0, *rooms])
    matrices = _matrices(tensors, spread, slots, begins)
    small = _tensors(tensors, params, spread, begins)
    # Once a batch, not once a step.
    matrices, small = jax.lax.optimization_barrier((matrices, small))
    self._matrices, self._tensors = _Noting(matrices), _Noting(small)
    self._own = network.own_tensors(self._tensors)

  @property
  def used(self) -> set[str]:
    """The paths of the parameters whose modules were called."""
    return self._matrices.used | self._tensors.used

  def intercept(
    self,
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    context: nn.module.InterceptorContext,
  ) -> Any:
    """An interceptor for `nn.intercept_methods`."""
    module, method = context.module, context.method_name
    if not module.path:  # The network itself, or one that is applied alone.
      return call(*args, **kwargs)
    if method == '__call__' and adapters.is_linear(module):
      return self._linear(call, module, *args, **kwargs)
    if method == '__call__' and adapters.is_embedding(module):
      return self._embed(call, module, *args, **kwargs)
    if method == 'attend' and adapters.is_embedding(module):
      return self._attend(call, module, *args, **kwargs)
    return self._own(call, args, kwargs, context)

  def _linear(
    self, call: Callable[..., Array], module: nn.Module, x: Array
  ) -> Array:
    entries = self._matrices[_path(module, adapters.KERNEL)]
    dtype = _dtype(module)
    x = x.astype(dtype)
    y = _add_products(call(x), x, entries, entries.differences(dtype))
    if (path := _path(module, adapters.BIAS)) in self._tensors:
      seed: Array = module.get_variable('params', adapters.BIAS)
      added = (self._tensors[path] - seed).astype(y.dtype)
      # An example's beams are adjacent rows.
      added = jnp.repeat(added, len(y) // len(added), axis=0)
      y += added.reshape(len(y), *[1] * (y.ndim - 2), -1)
    return y

  def _attend(
    self, call: Callable[..., Array], module: nn.Module, x: Array
  ) -> Array:
    entries = self._matrices[_path(module, adapters.TABLE)]
    y = call(x)
    turned = entries._replace(rows=entries.columns, columns=entries.rows)
    return _add_products(y, x, turned, entries.differences(y.dtype))

  def _embed(
    self, call: Callable[..., Array], module: nn.Module, tokens: Array
  ) -> Array:
    entries = self._matrices[_path(module, adapters.TABLE)]
    found = call(tokens)
    batch = len(entries.rows)

    def of_example(
      x: Array, tokens: Array, entries: Entries, differences: Array
    ) -> Array:
      same = tokens[:, None] == entries.rows
      hits = jnp.where(same, differences, 0)
      return x.at[:, entries.columns].add(hits)

    x = jax.vmap(of_example)(
      found.reshape(batch, -1, found.shape[-1]).astype(jnp.float32),
      tokens.reshape(batch, -1),
      entries,
      entries.differences(found.dtype),
    )
    return x.reshape(found.shape).astype(found.dtype)


def _path(module: nn.Module, name: str) -> str:
  return '/'.join((*module.path, name))


def _dtype(module: nn.Module) -> Any:
  """Returns the type of a linear map's activations."""
  return getattr(module, 'dtype', None) or jnp.float32


def _is_small(path: str) -> bool:
  """Returns whether every example gets a whole tensor of its own."""
  name = path.rpartition('/')[2]
  return name not in (adapters.KERNEL, adapters.TABLE)


def _matrices(
  tensors: on_device.Tensors,
  spread: slots_lib.Spread,
  slots: slots_lib.Slots,
  begins: np.ndarray,
) -> dict[str, Entries]:
  """Returns path -> entries, of what is not small."""
  columns = [shape[-1] if shape else 1 for shape in tensors.shapes]
  of_slot = jnp.asarray(columns, jnp.uint32)[slots.tensor]
  # A slot without an entry reads and adds nothing but in its own row's first
  # place: what others have there may be infinite, and 0 times that is NaN.
  positions = jnp.where(spread.own, spread.positions, 0)
  row, column = jnp.divmod(positions, of_slot)
  all_entries = Entries(
    row.astype(jnp.int32),
    column.astype(jnp.int32),
    jnp.where(spread.own, spread.values, 0),
    jnp.where(spread.own, spread.seeds, 0),
  )
  # Else XLA would work each slice out anew.
  all_entries = jax.lax.optimization_barrier(all_entries)
  return {
    path: Entries(*(x[:, begins[i] : begins[i + 1]] for x in all_entries))
    for i, path in enumerate(tensors.paths)
    if not _is_small(path)
  }


def _tensors(
  tensors: on_device.Tensors,
  params: PyTree,
  spread: slots_lib.Spread,
  begins: np.ndarray,
) -> dict[str, Array]:
  """Returns path -> each example's tensor [batch, …], of what is small."""
  small = [i for i, path in enumerate(tensors.paths) if _is_small(path)]
  if not small:
    return {}
  leaves = jax.tree.leaves(params)
  # One scatter for all of them.
  seed = jnp.concatenate([leaves[i].reshape(-1) for i in small])
  sizes = tensors.sizes
  ends = np.cumsum([sizes[i] for i in small])
  where, values = [], []
  for i, end in zip(small, ends, strict=True):
    here = slice(begins[i], begins[i + 1])
    positions = spread.positions[:, here].astype(jnp.int32)
    positions += end - sizes[i]
    where.append(jnp.where(spread.own[:, here], positions, len(seed)))
    values.append(spread.values[:, here])
  tuned = jax.vmap(lambda at, new: seed.at[at].set(new, mode='drop'))(
    jnp.concatenate(where, 1), jnp.concatenate(values, 1)
  )
  return {
    tensors.paths[i]: of.reshape(-1, *tensors.shapes[i])
    for i, of in zip(small, jnp.split(tuned, ends[:-1], axis=1), strict=True)
  }


def _add_products(
  y: Array, x: Array, entries: Entries, differences: Array
) -> Array:
  """Returns y + x·D, D [n, features] of each example.

  Args:
    y: `[batch · beams, length, features]`.
    x: `[batch · beams, length, n]`.
    entries: where those of D are.
    differences: float32 [batch, room], the entries of D.
  """
  rows, columns = entries.rows, entries.columns
  batch, (n, features) = len(rows), (x.shape[-1], y.shape[-1])
  # Flattened, the simplest gather and scatter that there are.
  row = jnp.arange(y.size // features).reshape(batch, -1, 1)
  found = x.reshape(-1).at[row * n + rows[:, None]].get(mode='clip')
  products = found.astype(jnp.float32) * differences[:, None]
  flat = y.astype(jnp.float32).reshape(-1)
  flat = flat.at[row * features + columns[:, None]].add(products, mode='drop')
  return flat.reshape(y.shape).astype(y.dtype)


def check(network: api.Network, params: PyTree) -> None:
  """Checks that examples with different subsets can be in one batch.

  Args:
    network: the model.
    params: its parameters.

  Raises:
    UserError: they cannot: a parameter acts in another way than through a
      linear map, a table of embeddings, or what the network says; or not all
      are float32.
  """
  if any(x.dtype != jnp.float32 for x in jax.tree.leaves(params)):
    raise UserError('only seeds whose parameters are float32 can be served')
  leaves = jax.tree.leaves_with_path(params)
  tensors = on_device.Tensors(
    tuple(tree_paths.path_of(path) for path, _ in leaves),
    tuple(leaf.shape for _, leaf in leaves),
  )
  rooms = tuple(min(size, 1) for size in tensors.sizes)
  used: set[str] = set()

  def decode(params: PyTree, subsets: on_device.Arrays, tokens: Array) -> Any:
    by_example = Corrections(
      network, tensors, params, subsets, rooms, slots_lib.slots_of(rooms)
    )
    with nn.intercept_methods(by_example.intercept):
      found = decoding.GreedyDecoder()(network, params, tokens, 2)
    used.update(by_example.used)
    return found

  def shape(dtype: Any, *sizes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((2, *sizes), dtype)

  entries: Any = shape(jnp.uint32, len(rooms))
  starts: Any = shape(jnp.int32, len(rooms) + 1)
  subsets = on_device.Arrays(entries, entries, entries, starts)
  jax.eval_shape(decode, params, subsets, shape(jnp.int32, 16))
  if unknown := sorted(set(tensors.paths) - used):
    raise UserError(
      f'serving cannot give each row a {unknown[0]} of its own: it belongs to'
      ' no linear map and no table of embeddings, and the network says nothing'
      f' of it, see `api.Network.own_tensors` ({len(unknown)} such tensors)'
    )
