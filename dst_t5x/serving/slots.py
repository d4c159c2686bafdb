"""Arranges the entries of placed subsets by tensor, for mixed batches.

A placed subset's vectors hold its entries without gaps. Here each tensor gets a
room, a fixed number of slots that is the same for every subset of a class. The
entries of a tensor are then the same slice for all examples of a batch.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dst_t5x.subsets import on_device

Array = jax.Array


class Slots(NamedTuple):
  """The slots of all rooms, in order.

  Attributes:
    tensor: int32 [slots], the index of the tensor whose room holds the slot.
    place: int32 [slots], the slot's index in its room.
  """

  tensor: Array
  place: Array


def slots_of(rooms: on_device.Rooms) -> Slots:
  """Returns the slots of the rooms."""
  tensor = np.repeat(np.arange(len(rooms), dtype=np.int32), rooms)
  begins = np.cumsum([0, *rooms[:-1]])
  place = np.arange(len(tensor)) - begins[tensor]
  return Slots(jnp.asarray(tensor), jnp.asarray(place.astype(np.int32)))


class Spread(NamedTuple):
  """A subset of one round, with each entry in a slot; all arrays are [slots].

  Attributes:
    positions: uint32, positions in the flattened tensors.
    values: float32, the subset's values.
    seeds: float32, the seed's values.
    own: bool, whether the slot has an entry; if not, its other arrays are
      undefined.
  """

  positions: Array
  values: Array
  seeds: Array
  own: Array


def spread(arrays: on_device.Arrays, slots: Slots) -> Spread:
  """Returns a float32 subset with each entry in its slot.

  Each room must be large enough for its tensor's entries.
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
