"""One forward pass in which every example has a subset of its own.

The big matrices are the seed's for all examples. Where a linear map y = xW is
applied, an example b adds x·(W_b - W), a sum over its few entries of W:

    y[b, :, column] += x[b, :, row] · (value - seed)

The same for the embeddings. Of what is small, the layer norms' scales and the
biases of relative positions, every example has a tensor of its own.

Flax's `nn.intercept_methods` lets this be added from outside: the network
knows nothing of it.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dst_t5x.models.dropout import Dropout
from dst_t5x.models.t5 import attention
from dst_t5x.models.t5 import layers
from dst_t5x.serving import placement

Array = jax.Array
PyTree = Any


class Entries(NamedTuple):
  """What the subsets of a batch have in one matrix.

  Attributes:
    rows: int32 [batch, room].
    columns: int32 [batch, room].
    differences: float32 [batch, room], to the seed; 0 where there is nothing.
  """

  rows: Array
  columns: Array
  differences: Array


class Corrections:
  """Changes a network's modules as the subsets of a batch want it."""

  def __init__(
    self,
    tensors: placement.Tensors,
    params: PyTree,
    subsets: placement.Arrays,
    rooms: placement.Rooms,
    slots: placement.Slots,
    dtype: Any,
  ) -> None:
    """Sorts entries by tensors.

    Args:
      tensors: of the seed.
      params: the seed.
      subsets: of each example, stacked on axis 0.
      rooms: of each tensor; large enough for each subset in one round.
      slots: those of the rooms.
      dtype: of the network's activations.
    """
    spread = jax.vmap(lambda of: placement.spread(of, slots))(subsets)
    spread = jax.lax.optimization_barrier(spread)
    begins = np.cumsum([0, *rooms])
    self._matrices = _matrices(tensors, spread, slots, begins, dtype)
    self._tensors = _tensors(tensors, params, spread, begins)
    # Once a batch, not once a step.
    self._matrices, self._tensors = jax.lax.optimization_barrier(
      (self._matrices, self._tensors)
    )

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
    if method == '__call__' and type(module) in self._CALLS:
      return self._CALLS[type(module)](self, call, module, *args, **kwargs)
    if method == 'attend' and type(module) is layers.Embed:
      return self._attend(call, module, *args, **kwargs)
    return call(*args, **kwargs)

  def _dense(
    self, call: Callable[..., Array], module: layers.Dense, x: Array
  ) -> Array:
    entries = self._matrices[_path(module, 'kernel')]
    x = x.astype(module.dtype)
    return _add_products(call(x), x, entries)

  def _attend(
    self, call: Callable[..., Array], module: layers.Embed, x: Array
  ) -> Array:
    rows, columns, d = self._matrices[_path(module, 'embedding')]
    return _add_products(call(x), x, Entries(columns, rows, d))

  def _embed(
    self, call: Callable[..., Array], module: layers.Embed, tokens: Array
  ) -> Array:
    entries = self._matrices[_path(module, 'embedding')]

    def of_example(x: Array, tokens: Array, entries: Entries) -> Array:
      same = tokens[:, None] == entries.rows
      hits = jnp.where(same, entries.differences, 0)
      return x.at[:, entries.columns].add(hits)

    found = call(tokens)
    batch = len(entries.rows)
    x = jax.vmap(of_example)(
      found.reshape(batch, -1, found.shape[-1]).astype(jnp.float32),
      tokens.reshape(batch, -1),
      entries,
    )
    return x.reshape(found.shape).astype(found.dtype)

  def _norm(
    self, call: Callable[..., Array], module: layers.LayerNorm, x: Array
  ) -> Array:
    del call
    scales = self._tensors[_path(module, 'scale')]
    plain = layers.LayerNorm(module.dtype, module.epsilon, parent=None)
    result: Any = jax.vmap(
      lambda s, x: plain.apply({'params': {'scale': s}}, x)
    )(scales, x.reshape(len(scales), -1, x.shape[-1]))
    return result.reshape(x.shape)

  def _position_bias(
    self,
    call: Callable[..., Array],
    module: attention.RelativePositionBias,
    buckets: Array,
  ) -> Array:
    """Returns `[batch, heads, query, key]`."""
    del call
    tables = self._tensors[_path(module, 'rel_embedding')]
    plain = attention.RelativePositionBias(
      module.num_heads, module.num_buckets, parent=None
    )
    biases = jax.vmap(
      lambda t: plain.apply({'params': {'rel_embedding': t}}, buckets)
    )(tables)
    return jnp.asarray(biases)[:, 0]

  def _self_attention(
    self,
    call: Callable[..., Array],
    module: attention.SelfAttention,
    inputs: Array,
    mask: Array | None,
    bias: Array,
    dropout: Dropout,
    position: Array | None = None,
  ) -> Array:
    """Gives an example's bias to all its beams, which are adjacent rows."""
    del module
    beams = inputs.shape[0] // bias.shape[0]
    biases = jnp.repeat(bias, beams, axis=0)
    return call(inputs, mask, biases, dropout, position)

  _CALLS: Mapping[type[nn.Module], Callable[..., Any]] = {
    layers.Dense: _dense,
    layers.Embed: _embed,
    layers.LayerNorm: _norm,
    attention.RelativePositionBias: _position_bias,
    attention.SelfAttention: _self_attention,
  }


def _path(module: nn.Module, name: str) -> str:
  return '/'.join((*module.path, name))


def _is_small(path: str) -> bool:
  """Returns whether every example gets a whole tensor of its own."""
  return path.endswith(('/scale', '/rel_embedding'))


def _matrices(
  tensors: placement.Tensors,
  spread: placement.Spread,
  slots: placement.Slots,
  begins: np.ndarray,
  dtype: Any,
) -> dict[str, Entries]:
  """Returns path -> entries, of what is not small."""
  columns = [shape[-1] if shape else 1 for shape in tensors.shapes]
  of_slot = jnp.asarray(columns, jnp.uint32)[slots.tensor]
  # A slot without an entry reads and adds nothing but in its own row's first
  # place: what others have there may be infinite, and 0 times that is NaN.
  positions = jnp.where(spread.own, spread.positions, 0)
  row, column = jnp.divmod(positions, of_slot)
  values, seeds = (
    x.astype(dtype).astype(jnp.float32) for x in (spread.values, spread.seeds)
  )
  all_entries = Entries(
    row.astype(jnp.int32),
    column.astype(jnp.int32),
    jnp.where(spread.own, values - seeds, 0),
  )
  # Else XLA would work each slice out anew.
  all_entries = jax.lax.optimization_barrier(all_entries)
  return {
    path: Entries(*(x[:, begins[i] : begins[i + 1]] for x in all_entries))
    for i, path in enumerate(tensors.paths)
    if not _is_small(path)
  }


def _tensors(
  tensors: placement.Tensors,
  params: PyTree,
  spread: placement.Spread,
  begins: np.ndarray,
) -> dict[str, Array]:
  """Returns path -> each example's tensor [batch, …], of what is small."""
  small = [i for i, path in enumerate(tensors.paths) if _is_small(path)]
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


def _add_products(y: Array, x: Array, entries: Entries) -> Array:
  """Returns y + x·D, D [n, features] of each example.

  Args:
    y: `[batch · beams, length, features]`.
    x: `[batch · beams, length, n]`.
    entries: those of D.
  """
  rows, columns, differences = entries
  batch, (n, features) = len(rows), (x.shape[-1], y.shape[-1])
  # Flattened, the simplest gather and scatter that there are.
  row = jnp.arange(y.size // features).reshape(batch, -1, 1)
  found = x.reshape(-1).at[row * n + rows[:, None]].get(mode='clip')
  products = found.astype(jnp.float32) * differences[:, None]
  flat = y.astype(jnp.float32).reshape(-1)
  flat = flat.at[row * features + columns[:, None]].add(products, mode='drop')
  return flat.reshape(y.shape).astype(y.dtype)
