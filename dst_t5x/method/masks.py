"""Masks over a tree of parameters, eight components to a byte."""

from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any


def pack(masks: PyTree) -> PyTree:
  """Returns bool masks as uint8 bits, packed along the last axis.

  A tensor of fewer than two axes takes one byte per component. Its axis 0 may
  be the layers, and two layers never share a byte.
  """
  return jax.tree.map(
    lambda mask: jnp.packbits(
      mask if mask.ndim > 1 else mask[..., None], axis=-1
    ),
    masks,
  )


def unpack(packed: PyTree, like: PyTree) -> PyTree:
  """Returns the bool masks that `pack` packed, in the shapes of `like`."""

  def unpacked(bits: jax.Array, tensor: jax.Array) -> jax.Array:
    width = tensor.shape[-1] if tensor.ndim > 1 else 1
    mask = jnp.unpackbits(bits, axis=-1, count=width).astype(bool)
    return mask.reshape(tensor.shape)

  return jax.tree.map(unpacked, packed, like)


def is_packed(leaf: Any, shape: tuple[int, ...]) -> bool:
  """Returns whether `pack` can have made an array from a mask of this shape."""
  return leaf.dtype == jnp.uint8 and leaf.shape == _packed(shape)


def _packed(shape: tuple[int, ...]) -> tuple[int, ...]:
  *rows, last = shape if len(shape) > 1 else (*shape, 1)
  return (*rows, -(-last // 8))


def any_set(packed: PyTree) -> jax.Array:
  """Returns whether any component of the packed masks is set, bool []."""
  largest = [jnp.max(bits, initial=0) for bits in jax.tree.leaves(packed)]
  return jnp.max(jnp.stack(largest)) > 0


def nothing(like: PyTree) -> PyTree:
  """Returns packed masks with no component set, for the tensors of `like`."""
  return jax.tree.map(lambda x: jnp.zeros(_packed(x.shape), jnp.uint8), like)
