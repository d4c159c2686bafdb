"""Whether numbers are finite, of whole trees and at the speed of memory."""

from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any


def all_finite(tree: PyTree) -> jax.Array:
  """Returns bool []: whether no floating-point number is NaN or infinite."""
  finite = [
    jnp.isfinite(_farthest(x))
    for x in jax.tree.leaves(tree)
    if jnp.issubdtype(x.dtype, jnp.floating)
  ]
  return jnp.all(jnp.stack(finite)) if finite else jnp.asarray(True)


def _farthest(x: jax.Array) -> jax.Array:
  """Returns the largest magnitude, [], or NaN if there is one."""
  # The last axis goes first: XLA:CPU runs a reduction of everything on a
  # single thread.
  for_rows = jnp.max(jnp.abs(x), axis=-1, initial=0) if x.ndim else jnp.abs(x)
  return jnp.max(for_rows, initial=0)
