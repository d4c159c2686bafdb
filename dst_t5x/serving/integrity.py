"""A checksum of parameters, computed on the device.

It detects every change of a single component, and misses any other change with
a probability of 2⁻³². `fingerprint.fingerprint` tests exact identity, on the
host.
"""

from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any


@jax.jit
def checksum(params: PyTree) -> jax.Array:
  """Returns a checksum of each float32 tensor, uint32 [tensors].

  It is the sum of bit patterns times odd weights, modulo 2³². An odd weight is
  invertible, so a change of one component always changes the sum.
  """
  return jnp.stack([_of_tensor(leaf) for leaf in jax.tree.leaves(params)])


def _of_tensor(tensor: jax.Array) -> jax.Array:
  bits = jax.lax.bitcast_convert_type(tensor, jnp.uint32).reshape(-1)
  # Multiplication by 2³² / φ gives neighbouring components unrelated weights.
  place = jnp.arange(len(bits), dtype=jnp.uint32) * jnp.uint32(2654435769)
  return jnp.sum(bits * ((place ^ (place >> 15)) | 1), dtype=jnp.uint32)
