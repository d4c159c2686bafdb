"""The seed as a sparse list: where θᵗ differs from θ⁰, and the values of θ⁰.

With this list, θ⁰ can be rebuilt bit for bit from θᵗ, and the device need not
hold a copy of θ⁰. Each step makes the list anew, without sorting, from the mask
of the free components packed into words of 32 bits.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from dst_t5x.core import tree_paths
from dst_t5x.core.errors import UserError
from dst_t5x.method import set_bits
from dst_t5x.method import silos

PyTree = Any


class SparseSeed(NamedTuple):
  """The seed values of the free components, tensor after tensor.

  Attributes:
    positions: uint32 [budget], each component's position in its tensor.
    values: float32 [budget], the seed values.
    starts: int32 [tensors + 1], where each tensor's entries begin; the last is
      the number of entries.
  """

  positions: jax.Array
  values: jax.Array
  starts: jax.Array


def nothing(params: PyTree, budgets: Sequence[int]) -> SparseSeed:
  """Returns an empty list, with room for the budgets.

  Args:
    params: the parameters, or their shapes.
    budgets: [silos], the number of free components of each silo.

  Raises:
    UserError: a tensor is too large for positions of 31 bits.
  """
  tensors = jax.tree_util.tree_leaves_with_path(params)
  for key_path, tensor in tensors:
    if tensor.size >= 2**31 - 1:
      raise UserError(
        f'keep_seed=False: {tree_paths.path_of(key_path)!r} has {tensor.size} '
        'components, which is too many; keep the seed, or unstack the layers'
      )
  return SparseSeed(
    positions=jnp.zeros((sum(budgets),), jnp.uint32),
    values=jnp.zeros((sum(budgets),), jnp.float32),
    starts=jnp.zeros((len(tensors) + 1,), jnp.int32),
  )


class _Stretch(NamedTuple):
  """One tensor's stretch of the list.

  Attributes:
    first: int32 [], where the stretch begins in the list. The stretch can
      include entries of other tensors.
    is_used: bool [room], which entries are the tensor's.
    positions: int32 [room], positions in the tensor; the tensor's size where
      unused.
  """

  first: jax.Array
  is_used: jax.Array
  positions: jax.Array

  def of(self, values: jax.Array) -> jax.Array:
    """Returns the stretch of a list, [room]."""
    return lax.dynamic_slice_in_dim(values, self.first, len(self.is_used))


def _stretches(
  sparse: SparseSeed, layout: silos.Layout, tree: PyTree, budgets: Sequence[int]
) -> Iterator[tuple[jax.Array, _Stretch]]:
  """Yields each tensor and its stretch, with room for all free components."""
  for i, (leaf, tensor) in enumerate(
    zip(layout.leaves, jax.tree.leaves(tree), strict=True)
  ):
    room = min(sum(budgets[silo] for silo in set(leaf.silos)), tensor.size)
    start, end = sparse.starts[i], sparse.starts[i + 1]
    # A stretch that would end beyond the list starts earlier.
    first = jnp.minimum(start, len(sparse.positions) - room)
    here = first + jnp.arange(room)
    stretch = _Stretch(first, (here >= start) & (here < end), here)
    positions = stretch.of(sparse.positions).astype(jnp.int32)
    beyond = jnp.where(stretch.is_used, positions, tensor.size)
    yield tensor, stretch._replace(positions=beyond)


def rebuild(
  sparse: SparseSeed,
  layout: silos.Layout,
  params: PyTree,
  budgets: Sequence[int],
) -> PyTree:
  """Returns θ⁰, bit for bit.

  Args:
    sparse: the list.
    layout: the silos.
    params: θᵗ.
    budgets: [silos], the number of free components of each silo.
  """
  rebuilt = [
    tensor.reshape(-1)
    .at[stretch.positions]
    .set(stretch.of(sparse.values).astype(tensor.dtype), mode='drop')
    .reshape(tensor.shape)
    for tensor, stretch in _stretches(sparse, layout, params, budgets)
  ]
  return jax.tree.unflatten(jax.tree.structure(params), rebuilt)


def norm(
  sparse: SparseSeed,
  layout: silos.Layout,
  tree: PyTree,
  budgets: Sequence[int],
) -> jax.Array:
  """Returns the L2 norm of a tree over the free components, float32 []."""
  squares = jnp.float32(0)
  for tensor, stretch in _stretches(sparse, layout, tree, budgets):
    flat = tensor.reshape(-1).astype(jnp.float32)
    free = flat.at[stretch.positions].get(mode='fill', fill_value=0)
    squares += jnp.sum(jnp.square(free))
  return jnp.sqrt(squares)


def extract(
  keep: PyTree, seed: PyTree, layout: silos.Layout, budgets: Sequence[int]
) -> SparseSeed:
  """Returns the list of the free components' seed values.

  Args:
    keep: a tree of bool masks of the free components, within the budgets.
    seed: θ⁰.
    layout: the silos.
    budgets: [silos], the number of free components of each silo.
  """
  words = [_words(mask) for mask in jax.tree.leaves(keep)]
  borders = np.cumsum([0, *(len(w) for w in words)])
  all_words = jnp.concatenate(words)
  nth = jnp.arange(sum(budgets), dtype=jnp.int32)
  ends = set_bits.ends(all_words)
  word, bit = set_bits.find(all_words, ends, nth)
  tensor = jnp.searchsorted(jnp.asarray(borders[1:]), word, side='right')
  in_tensor = word - jnp.asarray(borders)[tensor]
  sparse = SparseSeed(
    positions=32 * in_tensor.astype(jnp.uint32) + bit,
    values=jnp.zeros(nth.shape, jnp.float32),
    starts=jnp.concatenate([jnp.zeros(1, jnp.int32), ends])[borders],
  )
  values = sparse.values
  for leaf, stretch in _stretches(sparse, layout, seed, budgets):
    flat = leaf.reshape(-1).astype(jnp.float32)
    found = flat.at[stretch.positions].get(mode='fill', fill_value=0)
    found = jnp.where(stretch.is_used, found, stretch.of(values))
    values = lax.dynamic_update_slice_in_dim(values, found, stretch.first, 0)
  return sparse._replace(values=values)


def _words(mask: jax.Array) -> jax.Array:
  """Returns a mask as uint32 [words], 32 components to a word."""
  return set_bits.words(mask.reshape(1, -1))[0]
