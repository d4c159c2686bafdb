"""Reads and writes the listed components of one slice of a tensor.

A slice's stretch of a list is handled in pieces of a fixed length. A loop over
pieces does work in proportion to the entries that the slice has, which are
known only when the program runs.
"""

import functools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

PyTree = Any

# The most entries of a piece.
MOST = 8192


def _index(
  tensor: jax.Array, layer: Any, positions: jax.Array, valid: jax.Array
) -> tuple[Any, ...]:
  """Returns the index of components along each axis; outside if not valid.

  A tensor is not flattened, because a flat tensor has no sharding that its
  devices' parts fit.
  """
  shape = tensor.shape if layer is None else tensor.shape[1:]
  axes, rest = [], positions
  for size in reversed(shape):
    axes.append((rest % jnp.uint32(size)).astype(jnp.int32))
    rest = rest // jnp.uint32(size)
  axes = [jnp.where(valid, axis, jnp.iinfo(jnp.int32).max) for axis in axes]
  of_layer = [] if layer is None else [jnp.full(positions.shape, layer)]
  return (*of_layer, *reversed(axes))


def _pieces(
  count: jax.Array, most: int, body: Any, start: jax.Array, init: PyTree
) -> PyTree:
  """Calls `body(first, valid, carry)` for each piece of a stretch.

  Args:
    count: int32 [], the length of the stretch.
    most: the most that the length can be.
    body: the function; `valid` is bool [entries of a piece].
    start: int32 [], where the stretch begins.
    init: the first carry.
  """
  room = min(MOST, most)
  if most <= MOST:  # Loops take long to compile.
    return body(start, jnp.arange(room, dtype=jnp.int32) < count, init)

  def step(carry: tuple[jax.Array, PyTree]) -> tuple[jax.Array, PyTree]:
    done, value = carry
    valid = done + jnp.arange(room, dtype=jnp.int32) < count
    return done + room, body(start + done, valid, value)

  def not_done(carry: tuple[jax.Array, PyTree]) -> jax.Array:
    return carry[0] < count

  return lax.while_loop(not_done, step, (jnp.int32(0), init))[1]


@functools.partial(jax.jit, static_argnums=0)
def gather(
  most: int,
  tensor: jax.Array,
  layer: Any,
  start: jax.Array,
  count: jax.Array,
  positions: jax.Array,
  gathered: jax.Array,
) -> jax.Array:
  """Returns a list of values with a slice's listed components written into it.

  Args:
    most: the most entries that the slice can have.
    tensor: the tensor.
    layer: the slice's layer, int32 [], if the tensor is stacked; else None.
    start: int32 [], where the slice's entries begin in the list.
    count: int32 [], how many there are.
    positions: uint32 [room], the list, with room for a piece after its end.
    gathered: float32 [room], the list of values.
  """
  room = min(MOST, most)
  tensor = _with_axis(tensor, layer)

  def body(first: jax.Array, valid: jax.Array, into: jax.Array) -> jax.Array:
    here = lax.dynamic_slice_in_dim(positions, first, room)
    index = _index(tensor, layer, here, valid)
    found = tensor.at[index].get(mode='fill', fill_value=0)
    before = lax.dynamic_slice_in_dim(into, first, room)
    found = jnp.where(valid, found.astype(into.dtype), before)
    return lax.dynamic_update_slice_in_dim(into, found, first, 0)

  return _pieces(count, most, body, start, gathered)


@functools.partial(jax.jit, static_argnums=0)
def scatter(
  most: int,
  tensor: jax.Array,
  layer: Any,
  start: jax.Array,
  count: jax.Array,
  positions: jax.Array,
  values: jax.Array,
) -> jax.Array:
  """Returns the tensor with a slice's listed components replaced.

  Args:
    most: the most entries that the slice can have.
    tensor: the tensor.
    layer: the slice's layer, int32 [], if the tensor is stacked; else None.
    start: int32 [], where the slice's entries begin in the list.
    count: int32 [], how many there are.
    positions: uint32 [room], the list, with room for a piece after its end.
    values: [room], the new values.
  """
  room = min(MOST, most)

  def body(first: jax.Array, valid: jax.Array, into: jax.Array) -> jax.Array:
    here = lax.dynamic_slice_in_dim(positions, first, room)
    new = lax.dynamic_slice_in_dim(values, first, room).astype(tensor.dtype)
    index = _index(into, layer, here, valid)
    return into.at[index].set(new, mode='drop', unique_indices=True)

  new = _pieces(count, most, body, start, _with_axis(tensor, layer))
  return new.reshape(tensor.shape)


def _with_axis(tensor: jax.Array, layer: Any) -> jax.Array:
  """Returns the tensor with at least one axis in a slice."""
  is_scalar = tensor.ndim == int(layer is not None)
  return tensor[..., None] if is_scalar else tensor
