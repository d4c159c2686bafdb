"""A checksum of parameters where they are, to tell whether they are the seed.

It reads them once, on the device. It tells any change of one component, and
any others but by a chance of 2⁻³²; for exact identity there is
`fingerprint.fingerprint`, on the host.
"""

from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any


@jax.jit
def checksum(params: PyTree) -> jax.Array:
  """Returns uint32 [tensors], one number of each float32 tensor's bits.

  Sum of bits times odd weights modulo 2³²: no change of a single component is
  lost, since an odd number can be divided by.
  """
  return jnp.stack([_of_tensor(leaf) for leaf in jax.tree.leaves(params)])


def _of_tensor(tensor: jax.Array) -> jax.Array:
  bits = jax.lax.bitcast_convert_type(tensor, jnp.uint32).reshape(-1)
  # Multiplied by the golden ratio's fraction of 2³²: the weights of neighbours
  # have nothing to do with each other.
  place = jnp.arange(len(bits), dtype=jnp.uint32) * jnp.uint32(2654435769)
  return jnp.sum(bits * ((place ^ (place >> 15)) | 1), dtype=jnp.uint32)
