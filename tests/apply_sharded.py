"""Applies subsets to parameters on a mesh of eight devices, and reverts them.

A row of JSON for each kind of mesh. A process of its own, for JAX has to be
told the number of devices before it starts.
"""

import json
import re

import jax
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
import subsets

from dst_t5x import subsets as subset

# Shapes, and how they lie on the mesh.
_TREE = {
  'embedder': {'embedding': ((64, 16), ('model', 'data'))},
  'encoder': {
    'layers_0': {
      'mlp': {'wi': ((16, 32), (None, 'model')), 'wo': ((32, 16), ('model',))},
      'norm': {'scale': ((16,), ())},
    },
  },
  'decoder': {
    'layers': {
      'mlp': {'wi': ((4, 16, 32), ('data', None, 'model'))},
      'query': ((4, 16, 3), (None, ('data', 'model'))),
      'temperature': ((4,), ('data',)),
    },
    'logits': {'bias': ((64,), (('data', 'model'),))},
  },
  'temperature': ((), ()),
}


def _is_spec(node):
  return isinstance(node, tuple)


def _row(axis_type):
  mesh = jax.make_mesh((2, 4), ('data', 'model'), axis_types=(axis_type,) * 2)
  random = np.random.default_rng(0)
  seed = jax.tree.map(
    lambda spec: np.asarray(random.standard_normal(spec[0], np.float32)),
    _TREE,
    is_leaf=_is_spec,
  )
  shardings = jax.tree.map(
    lambda spec: NamedSharding(mesh, PartitionSpec(*spec[1])),
    _TREE,
    is_leaf=_is_spec,
  )
  params = jax.device_put(seed, shardings)
  is_equal = is_there = True
  for share in (0.1, 0.3):
    found, tuned = subsets.random_subset(seed, share, random)
    layout = subset.Layout(params, found.fingerprint)
    placed = layout.place(found, params)
    params = layout.write(params, placed, tuned=True)
    is_equal &= _equal(params, tuned)
    is_there &= jax.tree.map(lambda x: x.sharding, params) == shardings
    params = layout.write(params, placed, tuned=False)
    is_equal &= _equal(params, seed)
    is_there &= jax.tree.map(lambda x: x.sharding, params) == shardings
  return {
    'axes': axis_type.name,
    'is_equal': bool(is_equal),
    'is_there': bool(is_there),
    **_sent(params, layout, placed),
  }


def _equal(params, expected):
  return all(
    np.asarray(a).tobytes() == b.tobytes()
    for a, b in zip(
      jax.tree.leaves(params), jax.tree.leaves(expected), strict=True
    )
  )


def _sent(params, layout, placed):
  """Returns the shapes that devices exchange, and the operations."""
  leaves = jax.tree.leaves(params)
  programs = layout._compiled(placed.capacity, placed.slack)

  def sent(program, arrays):
    return re.findall(
      r'= \(?(\S+?)(?:\{\S*)? .*?'
      r'(all-reduce|all-gather|all-to-all|collective-permute)(?:-start)?\(',
      program.lower(leaves, arrays, 0).compile().as_text(),
    )

  return {
    'sent_by_write': sent(programs.write, [placed.arrays]),
    'sent_by_read': sent(programs.read, placed.arrays),
    'largest_room': max(layout.rooms(placed.capacity, placed.slack)),
    'largest_tensor': max(layout.sizes),
  }


for kind in (AxisType.Auto, AxisType.Explicit):
  print(json.dumps(_row(kind)))
