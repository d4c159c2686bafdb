"""Checks whole trees for NaN and infinity, at the speed of memory."""

from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any


def all_finite(tree: PyTree) -> jax.Array:
  """Returns whether all floating-point values are finite, bool []."""
  finite = [
    jnp.isfinite(_farthest(x))
    for x in jax.tree.leaves(tree)
    if jnp.issubdtype(x.dtype, jnp.floating)
  ]
  return jnp.all(jnp.stack(finite)) if finite else jnp.asarray(True)


def _farthest(x: jax.Array) -> jax.Array:
  """Returns the largest magnitude, [], or NaN if any value is NaN."""
  # In two reductions: XLA:CPU runs one over all axes on a single thread.
  for_rows = jnp.max(jnp.abs(x), axis=-1, initial=0) if x.ndim else jnp.abs(x)
  return jnp.max(for_rows, initial=0)
