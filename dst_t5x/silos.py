"""Silos: the partition of the parameters within which budgets hold.

A silo is a set of tensors, or of slices of stacked tensors. Tensor paths are
T5X's: `encoder/layers_3/attention/query/kernel`. In a stacked ("scanned")
network the same layer is slice 3 of `encoder/layers/attention/query/kernel`,
and it belongs to the same silo.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import math
import re
from typing import Any

import jax

from dst_t5x import budgets
from dst_t5x import thresholds
from dst_t5x.errors import UserError, nearest

PyTree = Any
SiloOf = Callable[[str], str]

STACK = 'layers'
_LAYER = re.compile(r'layers_\d+$')


def per_module_and_layer(path: str) -> str:
  """Returns the module of a layer: `encoder/layers_3/attention`.

  The default of the paper (Section 2): "each module in each layer is a
  separate silo". A module is what T5X names so: what stands below the layer,
  or, outside of the layers, what holds the tensor.
  """
  parts = path.split('/')
  for i, part in enumerate(parts[:-1]):
    if _LAYER.match(part):
      return '/'.join(parts[: i + 2])
  return '/'.join(parts[:-1]) or path


SILOS: Mapping[str, SiloOf] = {'per_module_and_layer': per_module_and_layer}


@dataclasses.dataclass(frozen=True)
class Leaf:
  """Where the components of one tensor belong.

  Attributes:
    path: T5X's path of the tensor, `layers` in it if it is stacked.
    stacked: whether axis 0 holds the layers.
    silos: [slices] index of the silo of each slice; one slice if not stacked.
    offsets: [slices] position of the slice's first component in its silo.
  """

  path: str
  stacked: bool
  silos: tuple[int, ...]
  offsets: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Layout:
  """The partition of a tree of parameters into silos.

  Attributes:
    leaves: one for each tensor, in the order of `jax.tree.leaves`.
    names: [silos] what each silo is called.
    sizes: [silos] number of components of each silo.
  """

  leaves: tuple[Leaf, ...]
  names: tuple[str, ...]
  sizes: tuple[int, ...]

  @property
  def size(self) -> int:
    """The number of components of all silos, n."""
    return sum(self.sizes)

  def budgets(self, epsilon: float) -> list[int]:
    """Returns the number of free components of each silo."""
    return budgets.largest_remainder(self.sizes, epsilon)


def path_of(key_path: Sequence[Any]) -> str:
  """Returns a JAX key path as `encoder/layers_0/mlp/wi_0/kernel`."""
  return jax.tree_util.keystr(tuple(key_path), simple=True, separator='/')


def slice_paths(path: str, shape: tuple[int, ...]) -> tuple[bool, list[str]]:
  """Returns whether a tensor is stacked, and the paths of its slices."""
  parts = path.split('/')
  if STACK not in parts[:-1] or not shape:
    return False, [path]
  i = parts.index(STACK)
  return True, [
    '/'.join([*parts[:i], f'{STACK}_{layer}', *parts[i + 1 :]])
    for layer in range(shape[0])
  ]


def _natural(name: str) -> list[tuple[int, int | str]]:
  """Sorts `layers_2` before `layers_10`."""
  return [
    (0, int(part)) if part.isdigit() else (1, part)
    for part in re.split(r'(\d+)', name)
    if part
  ]


def make_layout(params: PyTree, silos: str) -> Layout:
  """Assigns every component of `params` to a silo.

  Args:
    params: tree of arrays or of anything with a shape.
    silos: a name in `SILOS`.

  Returns:
    The layout. Stacked and unstacked trees of the same network give the same
    silos, in the same order, with the same positions.

  Raises:
    UserError: no such siloing, or a silo of 2³² − 1 components or more.
  """
  if silos not in SILOS:
    raise UserError(
      f'no silos {silos!r}{nearest(silos, SILOS)} (known: {sorted(SILOS)})'
    )
  silo_of = SILOS[silos]
  tensors: list[tuple[str, bool, list[str]]] = []
  components: dict[str, int] = {}  # Of each slice, by its unstacked path.
  for key_path, leaf in jax.tree_util.tree_leaves_with_path(params):
    path = path_of(key_path)
    stacked, paths = slice_paths(path, leaf.shape)
    tensors.append((path, stacked, paths))
    components |= dict.fromkeys(paths, math.prod(leaf.shape[int(stacked) :]))
  sizes: dict[str, int] = {}
  offsets: dict[str, int] = {}
  # Not in the order of the leaves, which is another one in a stacked tree.
  for path in sorted(components, key=_natural):
    silo = silo_of(path)
    offsets[path] = sizes.get(silo, 0)
    sizes[silo] = offsets[path] + components[path]
  names = sorted(sizes, key=_natural)
  for name in names:
    if sizes[name] > thresholds.FIRST:
      raise UserError(
        f'silo {name!r} has {sizes[name]} components, 2³² − 1 or '
        'more; use smaller silos'
      )
  index = {name: i for i, name in enumerate(names)}
  leaves = tuple(
    Leaf(
      path,
      stacked,
      silos=tuple(index[silo_of(p)] for p in paths),
      offsets=tuple(offsets[p] for p in paths),
    )
    for path, stacked, paths in tensors
  )
  return Layout(leaves, tuple(names), tuple(sizes[name] for name in names))
