"""One forward pass in which each example has its own subset.

All examples share the seed's large matrices. Where a linear map y = xW is
applied, example b adds x·(W_b - W), a sum over its few entries of W:

    y[b, :, column] += x[b, :, row] · (value - seed)

Embeddings are corrected in the same way. For small tensors, such as the scales
of norms, each example has its own; see `api.Network.own_tensors`.

Flax's `nn.intercept_methods` adds this from outside, so that networks need no
code for it.
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
  """The entries of a batch's subsets in one matrix.

  Attributes:
    rows: int32 [batch, room].
    columns: int32 [batch, room].
    values: float32 [batch, room], the subset's values; 0 in unused slots.
    seeds: float32 [batch, room], the seed's values; 0 in unused slots.
  """

  rows: Array
  columns: Array
  values: Array
  seeds: Array

  def differences(self, dtype: Any) -> Array:
    """Returns values minus seeds, float32 [batch, room].

    Args:
      dtype: the type to which the network casts the matrix; both are rounded to
        it first.
    """
    values, seeds = (
      x.astype(dtype).astype(jnp.float32) for x in (self.values, self.seeds)
    )
    return values - seeds


class Own(NamedTuple):
  """What the rows of a batch have of their own, each by its subset.

  Attributes:
    entries: of the rooms of all tensors, in order; [batch, slots].
    small: float32 [batch, n], the small tensors, flattened, in order.
  """

  entries: Entries
  small: Array


def own(
  tensors: on_device.Tensors,
  params: PyTree,
  subsets: on_device.Arrays,
  rooms: on_device.Rooms,
  slots: slots_lib.Slots,
) -> Own:
  """Sorts the subsets' entries by tensor.

  Args:
    tensors: the paths and shapes of the seed's tensors.
    params: the seed.
    subsets: each example's subset, stacked on axis 0.
    rooms: [tensors], each large enough for every subset, in one round.
    slots: the slots of the rooms.
  """
  spread = jax.vmap(lambda of: slots_lib.spread(of, slots))(subsets)
  spread = jax.lax.optimization_barrier(spread)
  begins = np.cumsum([0, *rooms])
  return Own(
    _entries(tensors, spread, slots), _small(tensors, params, spread, begins)
  )


class _Noting(dict[str, Any]):
  """A dict that records which keys were read."""

  def __init__(self, content: Mapping[str, Any]) -> None:
    super().__init__(content)
    self.used: set[str] = set()

  def __getitem__(self, key: str) -> Any:
    self.used.add(key)
    return super().__getitem__(key)


class Corrections:
  """Corrects the outputs of a network's modules for the subsets of a batch."""

  def __init__(
    self,
    network: api.Network,
    tensors: on_device.Tensors,
    rooms: on_device.Rooms,
    own: Own,
  ) -> None:
    """Takes what the rows have of their own.

    Args:
      network: the network.
      tensors: the paths and shapes of the seed's tensors.
      rooms: those of `own`.
      own: see the function `own`.
    """
    matrices = _matrices(tensors, own.entries, np.cumsum([0, *rooms]))
    small = _tensors(tensors, own.small)
    # Computed once per batch, not once per decoding step.
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
    """Calls a module and corrects its output; for `nn.intercept_methods`."""
    module, method = context.module, context.method_name
    if not module.path:  # The network itself, or a module applied alone.
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
      # The beams of an example are adjacent rows.
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
    batch, scale = len(entries.rows), getattr(module, 'scale', 1.0)

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
      scale * entries.differences(found.dtype),
    )
    return x.reshape(found.shape).astype(found.dtype)


def _path(module: nn.Module, name: str) -> str:
  return '/'.join((*module.path, name))


def _dtype(module: nn.Module) -> Any:
  """Returns the dtype of a linear map's activations."""
  return getattr(module, 'dtype', None) or jnp.float32


def _is_small(path: str) -> bool:
  """Returns whether each example gets its own copy of the tensor."""
  name = path.rpartition('/')[2]
  return name not in (adapters.KERNEL, adapters.TABLE)


def _matrices(
  tensors: on_device.Tensors, entries: Entries, begins: np.ndarray
) -> dict[str, Entries]:
  """Returns path -> entries, for tensors that are not small."""
  return {
    path: Entries(*(x[:, begins[i] : begins[i + 1]] for x in entries))
    for i, path in enumerate(tensors.paths)
    if not _is_small(path)
  }


def _entries(
  tensors: on_device.Tensors, spread: slots_lib.Spread, slots: slots_lib.Slots
) -> Entries:
  """Returns the entries of all rooms, [batch, slots]."""
  columns = [shape[-1] if shape else 1 for shape in tensors.shapes]
  of_slot = jnp.asarray(columns, jnp.uint32)[slots.tensor]
  # An unused slot reads and adds 0 at position 0 of its own example. Elsewhere
  # it could read another example's infinity, and 0·∞ is NaN.
  positions = jnp.where(spread.own, spread.positions, 0)
  row, column = jnp.divmod(positions, of_slot)
  entries = Entries(
    row.astype(jnp.int32),
    column.astype(jnp.int32),
    jnp.where(spread.own, spread.values, 0),
    jnp.where(spread.own, spread.seeds, 0),
  )
  # Without the barrier, XLA would recompute all entries for each slice.
  return jax.lax.optimization_barrier(entries)


def _places_of_small(tensors: on_device.Tensors) -> list[int]:
  """Returns the indices of the small tensors."""
  return [i for i, path in enumerate(tensors.paths) if _is_small(path)]


def _tensors(tensors: on_device.Tensors, joined: Array) -> dict[str, Array]:
  """Returns path -> each example's tensor [batch, …], for small tensors."""
  small = _places_of_small(tensors)
  ends = np.cumsum([tensors.sizes[i] for i in small])
  return {
    tensors.paths[i]: of.reshape(-1, *tensors.shapes[i])
    for i, of in zip(small, jnp.split(joined, ends[:-1], axis=1), strict=False)
  }


def _small(
  tensors: on_device.Tensors,
  params: PyTree,
  spread: slots_lib.Spread,
  begins: np.ndarray,
) -> Array:
  """Returns each example's small tensors, flattened, [batch, n]."""
  small = _places_of_small(tensors)
  if not small:
    return jnp.zeros((len(spread.own), 0))
  leaves = jax.tree.leaves(params)
  # One scatter for all small tensors.
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
  return jax.vmap(lambda at, new: seed.at[at].set(new, mode='drop'))(
    jnp.concatenate(where, 1), jnp.concatenate(values, 1)
  )


def _add_products(
  y: Array, x: Array, entries: Entries, differences: Array
) -> Array:
  """Returns y + x·D, where each example has its own sparse D [n, features].

  Args:
    y: `[batch · beams, length, features]`.
    x: `[batch · beams, length, n]`.
    entries: the positions of D's entries.
    differences: float32 [batch, room], the values of D's entries.
  """
  rows, columns = entries.rows, entries.columns
  batch, (n, features) = len(rows), (x.shape[-1], y.shape[-1])
  # On flattened arrays, gather and scatter have their simplest form.
  row = jnp.arange(y.size // features).reshape(batch, -1, 1)
  found = x.reshape(-1).at[row * n + rows[:, None]].get(mode='clip')
  products = found.astype(jnp.float32) * differences[:, None]
  flat = y.astype(jnp.float32).reshape(-1)
  flat = flat.at[row * features + columns[:, None]].add(products, mode='drop')
  return flat.reshape(y.shape).astype(y.dtype)


def prompt_length(network: api.Network, input_length: int) -> int:
  """Returns the length of the prompt of the longest inputs."""
  return len(network.prompt_of_inputs(np.zeros(input_length, np.int32)))


def check(
  network: api.Network, params: PyTree, input_length: int, output_length: int
) -> None:
  """Checks that examples with different subsets can be in one batch.

  Args:
    network: the model.
    params: its parameters.
    input_length: of the longest inputs.
    output_length: tokens that are decoded at most.

  Raises:
    UserError: a parameter is not float32, or is used neither in a linear map,
      nor in a table of embeddings, nor in `network.own_tensors`; or inputs and
      answers are longer than the network's context.
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
    slots = slots_lib.slots_of(rooms)
    found = own(tensors, params, subsets, rooms, slots)
    by_example = Corrections(network, tensors, rooms, found)
    with nn.intercept_methods(by_example.intercept):
      answers = decoding.GreedyDecoder()(network, params, tokens, output_length)
    used.update(by_example.used)
    return answers

  def shape(dtype: Any, *sizes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((2, *sizes), dtype)

  entries: Any = shape(jnp.uint32, len(rooms))
  starts: Any = shape(jnp.int32, len(rooms) + 1)
  subsets = on_device.Arrays(entries, entries, entries, starts)
  prompts = shape(jnp.int32, prompt_length(network, input_length))
  jax.eval_shape(decode, params, subsets, prompts)
  if unknown := sorted(set(tensors.paths) - used):
    raise UserError(
      f'serving cannot give each row a {unknown[0]} of its own: it belongs to'
      ' no linear map and no table of embeddings, and the network does not'
      f' handle it in `api.Network.own_tensors` ({len(unknown)} such tensors)'
    )
