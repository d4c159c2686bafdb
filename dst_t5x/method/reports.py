"""Reports on the subset during training: its size and churn in each silo."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dst_t5x.method import masks
from dst_t5x.method import silos

PyTree = Any

NORMS = ('gradient_norm', 'update_norm')


def differs(a: jax.Array, b: jax.Array) -> jax.Array:
  """Returns which components differ in their bits, bool of the same shape.

  Args:
    a: any array.
    b: an array of the same dtype, or of one whose values `a` can hold exactly.
  """
  unsigned = jnp.dtype(f'uint{8 * a.dtype.itemsize}')
  return jax.lax.bitcast_convert_type(
    a, unsigned
  ) != jax.lax.bitcast_convert_type(b.astype(a.dtype), unsigned)


def norm_of_free(tree: PyTree, params: PyTree, seed: PyTree) -> jax.Array:
  """Returns the L2 norm over the free components, float32 [].

  Args:
    tree: gradients or updates.
    params: θᵗ; a component is free if it differs from the seed.
    seed: θ⁰; () if every component is free.
  """
  if jax.tree.leaves(seed):
    free = jax.tree.map(differs, params, seed)
    tree = jax.tree.map(lambda mask, x: jnp.where(mask, x, 0), free, tree)
  squares = [
    jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)
  ]
  return jnp.sqrt(sum(squares, jnp.float32(0)))


def pack_free(params: PyTree, seed: PyTree) -> PyTree:
  """Returns the masks of the free components, packed by `masks.pack`."""
  return masks.pack(jax.tree.map(differs, params, seed))


def subset_report(
  layout: silos.Layout, params: PyTree, seed: PyTree, before: PyTree
) -> tuple[dict[str, jax.Array], PyTree]:
  """Counts the subset, silo by silo.

  Args:
    layout: the silos.
    params: θᵗ.
    seed: θ⁰.
    before: what `pack_free` returned at the last report.

  Returns:
    The counts, and what `pack_free` returns now. The counts are `free`, uint32
    [silos], the components that differ from the seed, and `new`, uint32
    [silos], the free components that were not free at the last report.
  """
  now = pack_free(params, seed)
  counts = {
    name: jnp.zeros(len(layout.names), jnp.uint32) for name in ('free', 'new')
  }
  for leaf, a, b in zip(
    layout.leaves, jax.tree.leaves(now), jax.tree.leaves(before), strict=True
  ):
    for name, mask in (('free', a), ('new', a & ~b)):
      set_bits = jax.lax.population_count(mask).astype(jnp.uint32)
      per_slice = jnp.sum(set_bits.reshape(len(leaf.silos), -1), axis=1)
      counts[name] = counts[name].at[jnp.asarray(leaf.silos)].add(per_slice)
  return counts, now


def count_free(
  layout: silos.Layout, params: PyTree, seed: PyTree
) -> np.ndarray:
  """Returns how many components differ from the seed, uint64 [silos].

  Args:
    layout: the silos.
    params: θᵗ, arrays on the devices or the host.
    seed: θ⁰.
  """
  return np.asarray(_count_free(layout, params, seed)).astype(np.uint64)


@functools.partial(jax.jit, static_argnames='layout')
def _count_free(
  layout: silos.Layout, params: PyTree, seed: PyTree
) -> jax.Array:
  nothing = masks.nothing(params)
  return subset_report(layout, params, seed, nothing)[0]['free']


def means_of_modules(
  layout: silos.Layout, of_silos: np.ndarray
) -> dict[str, float]:
  """Returns name of a module -> mean over its layers of a number of each silo.

  Args:
    layout: the silos.
    of_silos: [silos].
  """
  modules: dict[str, list[float]] = {}
  for silo, number in zip(layout.names, of_silos, strict=True):
    modules.setdefault(silos.without_layer(silo), []).append(float(number))
  return {
    module: float(np.mean(numbers))
    for module, numbers in sorted(modules.items())
  }
