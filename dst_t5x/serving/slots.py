"""The entries of placed subsets, tensor by tensor, for batches of several.

A placed subset's vectors hold its entries one after the other. Here each tensor
has a room of its own, as large for every subset of a class, so that the entries
of a tensor are the same slice for all examples of a batch.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dst_t5x.subsets import on_device

Array = jax.Array


class Slots(NamedTuple):
  """Where rooms lie one after the other; it depends on the rooms alone.

  Attributes:
    tensor: int32 [slots], whose room a slot is in.
    place: int32 [slots], which slot of its room it is.
  """

  tensor: Array
  place: Array


def slots_of(rooms: on_device.Rooms) -> Slots:
  """Returns the slots of some rooms."""
  tensor = np.repeat(np.arange(len(rooms), dtype=np.int32), rooms)
  begins = np.cumsum([0, *rooms[:-1]])
  place = np.arange(len(tensor)) - begins[tensor]
  return Slots(jnp.asarray(tensor), jnp.asarray(place.astype(np.int32)))


class Spread(NamedTuple):
  """A subset of one round, each entry in a slot: [slots] all.

  Attributes:
    positions: uint32, in the flattened tensors.
    values: float32, the subset's.
    seeds: float32, the seed's.
    own: whether there is an entry; else the others mean nothing.
  """

  positions: Array
  values: Array
  seeds: Array
  own: Array


def spread(arrays: on_device.Arrays, slots: Slots) -> Spread:
  """Gives each entry of a float32 subset its slot.

  There has to be room for all of them.
  """
  entry = arrays.starts[slots.tensor] + slots.place
  positions, values, seeds = (
    vector.at[entry].get(mode='clip') for vector in arrays[:3]
  )
  own = entry < arrays.starts[slots.tensor + 1]
  values, seeds = (
    jax.lax.bitcast_convert_type(bits, jnp.float32) for bits in (values, seeds)
  )
  return Spread(positions, values, seeds, own)
