"""Lets XLA choose the shardings inside a function on any mesh.

On a mesh with explicit axes, JAX stores shardings in array types, derives them
for each intermediate result, and refuses operations whose sharding is
ambiguous.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

PyTree = Any


def hide(
  function: Callable[..., PyTree], results: PyTree = None
) -> Callable[..., PyTree]:
  """Returns the function, traced with automatic instead of explicit mesh axes.

  Args:
    function: a function from arrays to arrays.
    results: arrays whose shardings the results get; if None, the results are
      replicated.
  """

  def call(*arguments: PyTree) -> PyTree:
    shardings = [jax.typeof(x).sharding for x in jax.tree.leaves(arguments)]
    meshes = [s.mesh for s in shardings if s.mesh.explicit_axes]
    if not meshes:
      return function(*arguments)
    everywhere = NamedSharding(meshes[0], PartitionSpec())

    def sharding(result: Any) -> NamedSharding:
      typed = jax.typeof(result).sharding
      return everywhere if typed.mesh.empty else typed

    wanted = everywhere if results is None else jax.tree.map(sharding, results)
    return jax.sharding.auto_axes(function, out_sharding=wanted)(*arguments)

  return call
