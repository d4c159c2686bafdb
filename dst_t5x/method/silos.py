r"""Silos: the partition of the parameters within which budgets hold.

A silo is a set of tensors, or of slices of stacked tensors. Tensor paths are
T5X's: `stack/layers_3/attention/query/kernel`. In a stacked ("scanned")
network the same layer is slice 3 of `stack/layers/attention/query/kernel`,
and it belongs to the same silo.

`SILOS` has the paper's silos (Section 2, App. A). Users can define their own as
rules: pairs of a regular expression and a silo's name. The first expression
that matches the whole path decides. The name can refer to its groups:

>>> norms_apart = [(r'(\w+)/.*norm/scale', r'norms of the \1'),
...                (r'.*', 'all else')]
>>> named(norms_apart)('stack/layers_3/pre_mlp_layer_norm/scale')
'norms of the stack'
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import math
import re
from typing import Any, Literal

import jax

from dst_t5x.core import tree_paths
from dst_t5x.core.errors import UserError, nearest
from dst_t5x.method import budgets

PyTree = Any
SiloOf = Callable[[str], str]
Rules = Sequence[tuple[str, str]]
# A name in `SILOS`, or rules.
Silos = (
  Literal['none', 'per_module', 'per_module_and_layer', 'per_tensor'] | Rules
)

# The silo of tensors that are not tuned; the only one without a budget.
EXCLUDED = '(excluded)'
# The most components in a tensor, or in a slice of a stacked one. Positions are
# uint32, and one value is reserved for "none".
MOST = 2**32 - 2


def none(path: str) -> str:
  """Returns the same silo for all paths: one threshold for the whole model."""
  del path
  return 'model'


def per_tensor(path: str) -> str:
  """Returns the path itself: each tensor of each layer is a silo."""
  return path


def per_module(path: str) -> str:
  """Returns the module, common to all layers: `stack/attention`."""
  parts = per_module_and_layer(path).split('/')
  return '/'.join(part for part in parts if not tree_paths.is_layer(part))


def without_layer(silo: str) -> str:
  """Returns a silo's name without its layer: `stack/attention`."""
  return re.sub(rf'{tree_paths.STACK}_\d+/', '', silo)


def per_module_and_layer(path: str) -> str:
  """Returns the module of a layer: `stack/layers_3/attention`.

  This is the paper's default (Section 2): "each module in each layer is a
  separate silo". In a layer, the module is the path's component below the
  layer. Elsewhere it is the path without the tensor's name.
  """
  parts = path.split('/')
  for i, part in enumerate(parts[:-1]):
    if tree_paths.is_layer(part):
      return '/'.join(parts[: i + 2])
  return '/'.join(parts[:-1]) or path


SILOS: Mapping[str, SiloOf] = {
  'none': none,
  'per_module': per_module,
  'per_module_and_layer': per_module_and_layer,
  'per_tensor': per_tensor,
}


def named(silos: str | Rules) -> SiloOf:
  """Returns the function that maps a path to its silo.

  Args:
    silos: a name in `SILOS`, or rules: pairs of a regular expression for whole
      paths and a silo's name.

  Raises:
    UserError: the name is unknown, or a rule is not such a pair. The returned
      function raises it for a path that no rule matches.
  """
  if isinstance(silos, str):
    if silos not in SILOS:
      raise UserError(
        f'no silos {silos!r}{nearest(silos, SILOS)} (known: {sorted(SILOS)}, '
        'or pairs of a regular expression and a name)'
      )
    return SILOS[silos]
  rules = []
  for rule in silos:
    if (
      isinstance(rule, str)
      or len(rule) != 2
      or not all(isinstance(part, str) for part in rule)
    ):
      raise UserError(
        f'a rule for silos is a regular expression and a name, not {rule!r}'
      )
    rules.append((expression(rule[0]), rule[1]))

  def silo_of(path: str) -> str:
    for pattern, name in rules:
      if match := pattern.fullmatch(path):
        try:
          return match.expand(name)
        except (re.error, IndexError) as e:
          raise UserError(f'name of a silo {name!r}: {e}') from e
    raise UserError(
      f'no rule names the silo of {path!r}; end the rules with '
      "('.*', 'all else'), or exclude it"
    )

  return silo_of


def checked(silos: str | Rules) -> str | Rules:
  """Returns silos that can be hashed: gin passes lists, and `jit` hashes.

  Raises:
    UserError: see `named`.
  """
  named(silos)
  if isinstance(silos, str):
    return silos
  return tuple(tuple(rule) for rule in silos)  # type: ignore[misc]


def expression(pattern: str) -> re.Pattern[str]:
  """Returns the compiled regular expression.

  Raises:
    UserError: the pattern is not a regular expression.
  """
  try:
    return re.compile(pattern)
  except (re.error, TypeError) as e:
    raise UserError(f'{pattern!r} is no regular expression: {e}') from e


@dataclasses.dataclass(frozen=True)
class Leaf:
  """The silos of one tensor's slices; a tensor that is not stacked has one.

  Attributes:
    path: T5X's path of the tensor; contains `layers` if it is stacked.
    stacked: whether axis 0 is the layers.
    silos: [slices], the index of each slice's silo.
    offsets: [slices], the position of the slice's first component in its silo.
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
    names: [silos], the name of each silo; the last may be `EXCLUDED`.
    sizes: [silos], the number of components of each silo.
  """

  leaves: tuple[Leaf, ...]
  names: tuple[str, ...]
  sizes: tuple[int, ...]

  @property
  def size(self) -> int:
    """The number of components of all silos, `EXCLUDED` included."""
    return sum(self.sizes)

  @property
  def included(self) -> int:
    """n, the number of components that are not excluded (Eq. 1)."""
    return sum(self.sizes[: self._silos])

  @property
  def _silos(self) -> int:
    return len(self.names) - (EXCLUDED in self.names)

  def budgets(self, epsilon: float) -> list[int]:
    """Returns the number of free components of each silo."""
    free = budgets.largest_remainder(self.sizes[: self._silos], epsilon)
    return free + [0] * (EXCLUDED in self.names)

  def quotas(self, epsilon: float) -> list[int]:
    """Returns ⌊ε·|S|⌋ of each silo: Eq. 2, without the largest remainders."""
    share = budgets.check_epsilon(epsilon)
    free = [int(share * size) for size in self.sizes[: self._silos]]
    return free + [0] * (EXCLUDED in self.names)

  def share_of_included(self, epsilon: float) -> str:
    """Returns the budget as a share of n, a line; '' if none is excluded."""
    if self.included == self.size:
      return ''
    share = sum(self.budgets(epsilon)) / self.included
    return f'{100 * share:.6g} % of the {self.included} that are not excluded\n'

  def table(self, epsilon: float) -> str:
    """Returns a text table: each silo's name, size and budget, and the sums."""
    free = self.budgets(epsilon)
    rows = [('silo', 'parameters', 'budget')]
    rows += [
      (name, f'{size:,}', f'{budget:,}')
      for name, size, budget in zip(self.names, self.sizes, free, strict=True)
    ]
    rows.append(('sum', f'{self.size:,}', f'{sum(free):,}'))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return '\n'.join(
      f'{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}'
      for a, b, c in rows
    )


def _natural(name: str) -> list[tuple[int, int | str]]:
  """Returns a sort key that puts `layers_2` before `layers_10`."""
  return [
    (0, int(part)) if part.isdigit() else (1, part)
    for part in re.split(r'(\d+)', name)
    if part
  ]


def make_layout(
  params: PyTree,
  silos: str | Rules = 'per_module_and_layer',
  exclude: Sequence[str] = (),
) -> Layout:
  """Assigns every component of `params` to a silo.

  Args:
    params: a tree of arrays, or of anything with a shape.
    silos: see `named`.
    exclude: regular expressions; a tensor whose path matches one is excluded.

  Returns:
    The layout. Stacked and unstacked trees of the same network give the same
    silos, in the same order, with the same positions.

  Raises:
    UserError: `silos` is unknown or has no silo for a path, an exclusion
      matches no tensor, all tensors are excluded, or a tensor is too large.
  """
  silo_of = _with_exclusions(named(silos), exclude)
  tensors: list[tuple[str, bool, list[str]]] = []
  components: dict[str, int] = {}  # Of each slice, by its unstacked path.
  for key_path, leaf in jax.tree_util.tree_leaves_with_path(params):
    path = tree_paths.path_of(key_path)
    stacked, paths = tree_paths.slice_paths(path, leaf.shape)
    tensors.append((path, stacked, paths))
    size = math.prod(leaf.shape[int(stacked) :])
    if size > MOST:
      raise UserError(
        f'{path!r} has {size} components: 2³² − 1 or more are too many'
      )
    components |= dict.fromkeys(paths, size)
  _check_exclusions(exclude, components)
  silo = {path: silo_of(path) for path in components}
  sizes: dict[str, int] = {}
  offsets: dict[str, int] = {}
  # Sorted by path: the order of leaves differs in a stacked tree.
  for path in sorted(components, key=_natural):
    offsets[path] = sizes.get(silo[path], 0)
    sizes[silo[path]] = offsets[path] + components[path]
  names = sorted(sizes, key=lambda name: (name == EXCLUDED, _natural(name)))
  index = {name: i for i, name in enumerate(names)}
  leaves = tuple(
    Leaf(
      path,
      stacked,
      silos=tuple(index[silo[p]] for p in paths),
      offsets=tuple(offsets[p] for p in paths),
    )
    for path, stacked, paths in tensors
  )
  return Layout(leaves, tuple(names), tuple(sizes[name] for name in names))


def _with_exclusions(silo_of: SiloOf, exclude: Sequence[str]) -> SiloOf:
  patterns = [expression(pattern) for pattern in exclude]

  def silo_or_excluded(path: str) -> str:
    if any(pattern.fullmatch(path) for pattern in patterns):
      return EXCLUDED
    return silo_of(path)

  return silo_or_excluded


def _check_exclusions(
  exclude: Sequence[str], components: Mapping[str, int]
) -> None:
  """Raises UserError if an exclusion matches no path, or all are excluded."""
  excluded: set[str] = set()
  for pattern in exclude:
    matched = {path for path in components if re.fullmatch(pattern, path)}
    if not matched:
      raise UserError(
        f'exclude: no parameter has a path like {pattern!r}; paths are like '
        f'{min(components, default="")!r}, and the whole path has to match'
      )
    excluded |= matched
  if components and len(excluded) == len(components):
    raise UserError('exclude: nothing is left to be tuned')
