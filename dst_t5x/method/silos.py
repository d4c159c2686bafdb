r"""Silos: the partition of the parameters within which budgets hold.

A silo is a set of tensors, or of slices of stacked tensors. Tensor paths are
T5X's: `stack/layers_3/attention/query/kernel`. In a stacked ("scanned")
network the same layer is slice 3 of `stack/layers/attention/query/kernel`,
and it belongs to the same silo.

Besides the paper's silos (Section 2, App. A) there are a user's own: pairs of
a regular expression over whole paths and a name, of which the first that
matches counts. The name may refer to groups of the expression:

>>> norms_apart = [(r'(\w+)/.*norm/scale', r'norms of the \1'),
...                (r'.*', 'all else')]
>>> named(norms_apart)('stack/layers_3/pre_mlp_layer_norm/scale')
'norms of the stack'
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import math
import re
from typing import Any

import jax

from dst_t5x.core import tree_paths
from dst_t5x.core.errors import UserError, nearest
from dst_t5x.method import budgets

PyTree = Any
SiloOf = Callable[[str], str]
Rules = Sequence[tuple[str, str]]

# Where tensors are that tuning leaves alone; the only silo without a budget.
EXCLUDED = '(excluded)'
# How many components a tensor may have, or a slice of a stacked one: their
# positions are uint32, and one more number has to mean "none".
MOST = 2**32 - 2


def none(path: str) -> str:
  """Returns one silo for all paths: one threshold for the whole model."""
  del path
  return 'model'


def per_tensor(path: str) -> str:
  """Returns the path itself: each tensor of each layer is a silo."""
  return path


def per_module(path: str) -> str:
  """Returns the module, spread over all layers: `stack/attention`."""
  parts = per_module_and_layer(path).split('/')
  return '/'.join(part for part in parts if not tree_paths.is_layer(part))


def without_layer(silo: str) -> str:
  """Returns a silo's module, whatever the layer: `stack/attention`."""
  return re.sub(rf'{tree_paths.STACK}_\d+/', '', silo)


def per_module_and_layer(path: str) -> str:
  """Returns the module of a layer: `stack/layers_3/attention`.

  The default of the paper (Section 2): "each module in each layer is a
  separate silo". A module is what T5X names so: what stands below the layer,
  or, outside of the layers, what holds the tensor.
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
  """Returns the silo of a path, as a function.

  Args:
    silos: a name in `SILOS`, or pairs of a regular expression that matches
      whole paths and the name of a silo.

  Raises:
    UserError: no such siloing, or rules that are not such pairs; the returned
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


def expression(pattern: str) -> re.Pattern[str]:
  """Returns the compiled expression; raises UserError if it is none."""
  try:
    return re.compile(pattern)
  except (re.error, TypeError) as e:
    raise UserError(f'{pattern!r} is no regular expression: {e}') from e


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
    names: [silos] what each silo is called; the last may be `EXCLUDED`.
    sizes: [silos] number of components of each silo.
  """

  leaves: tuple[Leaf, ...]
  names: tuple[str, ...]
  sizes: tuple[int, ...]

  @property
  def size(self) -> int:
    """The number of components of all silos, excluded ones too."""
    return sum(self.sizes)

  @property
  def included(self) -> int:
    """The number of components that the budget is a share of, n."""
    return sum(self.sizes[: self._silos])

  @property
  def _silos(self) -> int:
    return len(self.names) - (EXCLUDED in self.names)

  def budgets(self, epsilon: float) -> list[int]:
    """Returns the number of free components of each silo."""
    free = budgets.largest_remainder(self.sizes[: self._silos], epsilon)
    return free + [0] * (EXCLUDED in self.names)

  def quotas(self, epsilon: float) -> list[int]:
    """Returns ⌊ε·|S|⌋ of each silo, what Eq. 2 gives without correction."""
    share = budgets.check_epsilon(epsilon)
    free = [int(share * size) for size in self.sizes[: self._silos]]
    return free + [0] * (EXCLUDED in self.names)

  def share_of_included(self, epsilon: float) -> str:
    """Returns a line on the budget where something is excluded, else ''."""
    if self.included == self.size:
      return ''
    share = sum(self.budgets(epsilon)) / self.included
    return f'{100 * share:.6g} % of the {self.included} that are not excluded\n'

  def table(self, epsilon: float) -> str:
    """Returns silo, components and budget, a silo a line, and their sums."""
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
  """Sorts `layers_2` before `layers_10`."""
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
    params: tree of arrays or of anything with a shape.
    silos: see `named`.
    exclude: regular expressions; what any of them matches stays frozen.

  Returns:
    The layout. Stacked and unstacked trees of the same network give the same
    silos, in the same order, with the same positions.

  Raises:
    UserError: no such siloing, a path that no rule matches, an exclusion that
      matches nothing or leaves nothing, or a tensor that is too large.
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
  # Not in the order of the leaves, which is another one in a stacked tree.
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
  """Raises UserError for an exclusion without effect, or one of everything."""
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
