"""Projects on one device and on a mesh of eight; prints what came of it.

A row of JSON for each setting: whether all results are equal bit for bit, and
what the program for the mesh sends between devices. A process of its own, for
JAX has to be told the number of devices before it starts.
"""

import json
import math
import re

import jax
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

from dst_t5x.method import projection

# Shapes and how they lie on the mesh: each axis divided, by one or both axes of
# the mesh, or none; stacked, of one component a layer, of one component.
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
      'attention': {
        'query': ((4, 16, 3), (None, ('data', 'model'))),
        'out': ((4, 3, 16), ()),
      },
      'temperature': ((4,), ('data',)),
    },
    'logits': {
      'kernel': ((16, 64), ('data', 'model')),
      'bias': ((64,), (('data', 'model'),)),
    },
  },
  'temperature': ((), ()),
}
_TIES = (-1.0, 0.5, 1.0)
_SETTINGS = {
  'ties': (_TIES, AxisType.Explicit, {'epsilon': 0.2}),
  'one silo': (
    _TIES,
    AxisType.Auto,
    {'epsilon': 0.2, 'silos': 'none', 'exclude': ['.*/bias', '.*scale']},
  ),
  'random': (None, AxisType.Auto, {'epsilon': 0.1, 'distance': 'random'}),
  'normalized': (
    None,
    AxisType.Explicit,
    {'epsilon': 0.2, 'silos': 'none', 'normalization': 'mean'},
  ),
  'no churn': (None, AxisType.Auto, {'epsilon': 0.2, 'churn': False}),
  'iterative': (
    None,
    AxisType.Auto,
    {'epsilon': 0.2, 'silos': 'per_module', 'threshold': 'iterative'},
  ),
}
_COLLECTIVE = re.compile(
  r'= (\S.*) (all-reduce|all-gather|all-to-all|reduce-scatter|'
  r'collective-permute|collective-broadcast)(?:-start)?\('
)


def _map(function):
  return jax.tree.map(function, _TREE, is_leaf=lambda x: isinstance(x, tuple))


def _sent(program: str) -> list[tuple[str, str, int]]:
  """Returns operation, types and number of elements of each collective."""
  sent = []
  for types, operation in _COLLECTIVE.findall(program):
    shapes = re.findall(r'(\w+)\[([\d,]*)\]', types)
    size = sum(math.prod(int(n) for n in s.split(',') if n) for _, s in shapes)
    sent.append((operation, ' '.join({dtype for dtype, _ in shapes}), size))
  return sent


def _setting(values, axis_type, choices):
  """Returns the row of one setting."""
  mesh = jax.make_mesh((4, 2), ('data', 'model'), axis_types=(axis_type,) * 2)
  shardings = _map(lambda leaf: NamedSharding(mesh, PartitionSpec(*leaf[1])))
  random = np.random.default_rng(0)

  def tensor(leaf):
    shape, _ = leaf
    if values is None:
      return random.standard_normal(shape).astype(np.float32)
    return np.asarray(random.choice(values, shape), np.float32)

  seed = _map(tensor)
  method = projection.SubsetProjection(**choices)
  apply = jax.jit(method.apply)
  new, placed_seed = _map(tensor), jax.device_put(seed, shardings)
  one, one_state = apply(new, seed, jax.jit(method.init)(seed))
  arguments = (
    jax.device_put(new, shardings),
    placed_seed,
    jax.jit(method.init)(placed_seed),
  )
  program = apply.lower(*arguments).compile()
  many, many_state = program(*arguments)
  if not method.churn:  # The first step chooses, the second one stays.
    new = _map(tensor)
    one, one_state = apply(new, seed, one_state)
    new = jax.device_put(new, shardings)
    many, many_state = apply(new, placed_seed, many_state)
  is_equal = [
    np.asarray(a).tobytes() == np.asarray(b).tobytes()
    for a, b in zip(
      jax.tree.leaves((one, one_state)),
      jax.tree.leaves((many, many_state)),
      strict=True,
    )
  ]
  is_equal += [
    x.sharding.is_equivalent_to(sharding, x.ndim)
    for x, sharding in zip(
      jax.tree.leaves(many), jax.tree.leaves(shardings), strict=True
    )
  ]
  return {
    'is_equal': all(is_equal),
    'sent': _sent(program.as_text()),
    'silos': len(method.layout(seed).names),
    'free': sum(
      int((np.asarray(a) != b).sum())
      for a, b in zip(jax.tree.leaves(many), jax.tree.leaves(seed), strict=True)
    ),
    'size': sum(x.size for x in jax.tree.leaves(seed)),
  }


def main() -> None:
  """Prints the rows."""
  assert len(jax.devices()) == 8
  for name, setting in _SETTINGS.items():
    print(json.dumps({'name': name} | _setting(*setting)), flush=True)


if __name__ == '__main__':
  main()
