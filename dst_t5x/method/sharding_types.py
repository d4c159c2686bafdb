"""Leaves it to XLA how to divide a function, whatever the mesh's axes are.

On a mesh with explicit axes JAX keeps shardings in the arrays' types, works out
those of every intermediate result, and refuses what is ambiguous.
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
  """Returns the function, within which arrays have no shardings in their types.

  Args:
    function: arrays -> arrays.
    results: arrays of the types that the results are to have; if None, all
      devices have them whole.
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
