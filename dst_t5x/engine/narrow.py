"""A seed in bfloat16, and of θ only what differs from it.

Public decoder-only checkpoints are bfloat16. With SEED_DTYPE = 'bfloat16' the
devices hold the seed and all frozen parameters in that dtype, and of θ the list
`method.moved.Moved`. A step makes θ in float32 where it uses it and computes as
with a seed in float32, so nothing is rounded, and all results are the same.

θ is made anew for each use. Made once, it would stay in memory from the first
use to the last.
"""

from typing import Any, Literal, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from dst_t5x.adapters import network_parts
from dst_t5x.checkpoints import checkpoint_files
from dst_t5x.core import parts
from dst_t5x.core import tree_paths
from dst_t5x.core.errors import UserError
from dst_t5x.method import api as methods
from dst_t5x.method import moved

PyTree = Any
SeedDtype = Literal['float32', 'bfloat16']

_NAME = "SEED_DTYPE = 'bfloat16'"
# Positions in a list are int32, with room for a piece after the end.
_MOST = 2**31 - 2**14


class Held(NamedTuple):
  """The trained parameters and their seed, as the devices hold them.

  Attributes:
    params: θ, float32, or the list of what differs from a seed in bfloat16.
    seed: θ⁰; () if the method does not keep it and θ is whole.
  """

  params: PyTree
  seed: PyTree

  def theta(self) -> PyTree:
    """Returns θ, float32; from a list, made anew at each call."""
    if not isinstance(self.params, moved.Moved):
      return self.params
    # Without the barrier, XLA would merge the calls.
    held, seed = lax.optimization_barrier((self.params, self.seed))
    return held.restored(seed)

  def kept(self, program: methods.Program) -> PyTree:
    """Returns the copy of θ⁰ for a program, in a dtype that it accepts."""
    return self.seed if program.widens_seed else moved.wide(self.seed)

  def seed_for(self, program: methods.Program, state: PyTree) -> PyTree:
    """Returns θ⁰ for a program: the kept copy, or rebuilt from θ.

    Args:
      program: the method.
      state: its state.
    """
    if isinstance(self.params, moved.Moved):
      return self.kept(program)
    return program.seed(self.params, self.seed, state)

  def tuned_again(
    self,
    program: methods.Program,
    theta: PyTree,
    state: PyTree,
    before: PyTree,
  ) -> PyTree:
    """Returns what the optimizer saw; of a list, from a θ that is made anew.

    Args:
      program: the method.
      theta: θ.
      state: the method's state.
      before: what `program.tuned` returned for another θ of the same values.
    """
    is_list = isinstance(self.params, moved.Moved)
    return program.tuned(theta, state) if is_list else before

  def replaced(self, theta: PyTree) -> PyTree:
    """Returns other parameters in the form in which these are held."""
    if not isinstance(self.params, moved.Moved):
      return theta
    return moved.listed(theta, self.seed, self.params.room)

  def metrics(self) -> dict[str, jax.Array]:
    """Returns how many components a list had no room for, `lost`, int32 []."""
    is_list = isinstance(self.params, moved.Moved)
    return {'lost': self.params.lost} if is_list else {}


def for_network(frozen: PyTree) -> PyTree:
  """Returns frozen parameters in dtypes with which a network is exact.

  Kernels and tables stay as they are. Networks convert their values where they
  use them, or combine them with arrays in float32. Other parameters are small,
  and a network may compute with them alone, as in 1 + scale.
  """

  def wide(path: Any, x: jax.Array) -> jax.Array:
    name = tree_paths.path_of(path).rpartition('/')[2]
    is_large = name in (network_parts.KERNEL, network_parts.TABLE)
    return x if is_large else moved.wide(x)

  return jax.tree_util.tree_map_with_path(wide, frozen)


def held(theta: PyTree, seed: PyTree, room: int | None) -> PyTree:
  """Returns θ as the devices hold it.

  Args:
    theta: θ, float32.
    seed: θ⁰ as the devices hold it.
    room: see `room_for`.
  """
  return theta if room is None else moved.listed(theta, seed, room)


def room_for(
  dtype: SeedDtype,
  projection: methods.Projection,
  trained: PyTree,
  frozen: PyTree,
) -> int | None:
  """Returns how many components a list of θ has room for; None without one.

  Args:
    dtype: SEED_DTYPE.
    projection: the method, or its phase.
    trained: the shapes of the trained parameters.
    frozen: the shapes of the others.

  Raises:
    UserError: the method does not go with this dtype.
  """
  if dtype == 'float32':
    return None
  if not projection.constrains and frozen:
    return None  # An adapter, or few tensors, which have no seed on devices.
  size = sum(x.size for x in jax.tree.leaves(trained))
  room = projection.free_at_most(trained)
  if not projection.constrains or room >= size:
    raise UserError(
      f'{_NAME}: this method can change all parameters that it trains, which '
      "leaves none to hold in bfloat16; use SEED_DTYPE = 'float32'"
    )
  if not projection.keeps_to_budget:
    raise UserError(
      f'{_NAME} has room for the budget, which this method can exceed: use '
      "THRESHOLD = 'exact' or 'sort', or SEED_DTYPE = 'float32'"
    )
  if room > _MOST:
    raise UserError(
      f'{_NAME}: {room} parameters can differ from the seed, more than '
      f"{_MOST}; use a smaller EPSILON, or SEED_DTYPE = 'float32'"
    )
  return room


def check_seed(dtype: SeedDtype, params: PyTree, path: str) -> None:
  """Checks that a dtype holds all values of a seed exactly.

  Args:
    dtype: SEED_DTYPE.
    params: the seed, on the host.
    path: where it was read from.

  Raises:
    UserError: it does not.
  """
  if dtype == 'float32':
    return
  for name, array in parts.flatten(params).items():
    if not checkpoint_files.is_bfloat16(array):
      raise UserError(
        f'{_NAME}: {name} of {path} has values that are not bfloat16; round '
        f'them with `python -m dst_t5x.convert {path} TARGET --format=hf '
        "--dtype=bfloat16`, or use SEED_DTYPE = 'float32'"
      )


def narrowed(dtype: SeedDtype, params: PyTree) -> PyTree:
  """Returns host arrays in the dtype of the seed, if it holds them exactly.

  The fixed tensors of an adapter are no part of a seed and stay in float32.

  Args:
    dtype: SEED_DTYPE.
    params: arrays on the host.
  """
  if dtype == 'float32':
    return params

  def narrow(array: np.ndarray) -> np.ndarray:
    if not checkpoint_files.is_bfloat16(array):
      return array
    return np.asarray(array).astype(jnp.bfloat16)

  return jax.tree.map(narrow, params)
