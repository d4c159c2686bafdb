"""Budgets: how many parameters a method trains, and the size of its file."""

from collections.abc import Mapping, Sequence
import dataclasses
import re
from typing import Any, NamedTuple, cast

import jax

from dst_t5x import subsets
from dst_t5x.adapters import api as adapters
from dst_t5x.adapters import dora
from dst_t5x.adapters import ia3
from dst_t5x.adapters import lora
from dst_t5x.adapters import prompts
from dst_t5x.adapters import vera
from dst_t5x.core import parts
from dst_t5x.core import values
from dst_t5x.core.errors import UserError
from dst_t5x.engine import trained as trained_lib
from dst_t5x.method import api as methods
from dst_t5x.method import budgets
from dst_t5x.models import adapted
from dst_t5x.models import api

PyTree = Any

# The parameters that `gin/methods/norms.gin` trains.
NORMS = '.*norm/scale'
_FLOAT32 = 4  # Bytes.


@dataclasses.dataclass(frozen=True)
class Budget:
  """The budget of a method.

  Attributes:
    parameters: n, the number of the model's parameters, without an adapter's.
    free: the number of parameters that the method leaves different: the
      adapter's if it has one, else the model's.
    file_bytes: the approximate size of the result's file, in float32.
    most: how many of them can differ at any time, if more than `free`.
  """

  parameters: int
  free: int
  file_bytes: int
  most: int | None = None

  @property
  def free_at_most(self) -> int:
    """How many parameters can differ from the seed at any time."""
    return self.free if self.most is None else self.most

  @property
  def fraction(self) -> float:
    """The free parameters as a share of the model's."""
    return self.free / self.parameters

  def __str__(self) -> str:
    text = (
      f'{self.free:,} of {self.parameters:,} parameters '
      f'({100 * self.fraction:.6g} %), a file of {self.file_bytes:,} bytes'
    )
    if self.free_at_most > self.free:
      text += (
        f'; up to {self.free_at_most:,} can differ from the seed on the way'
      )
    return text


def of_run(
  base: PyTree,
  trained: PyTree,
  projection: methods.Projection,
  about: Mapping[str, Any] | None = None,
  adapter: adapters.Adapter = adapters.NONE,
) -> Budget:
  """Returns the budget of a run.

  Args:
    base: the shapes of the model's parameters, without an adapter's.
    trained: the shapes of the trained parameters.
    projection: the method.
    about: the known metadata of the subset's file.
    adapter: the network's adapter.
  """
  n, free = _size(base), _size(trained)
  if projection.constrains:
    free = projection.free(trained)
    size = subsets.predicted_bytes(base, free, about)
    return Budget(n, free, size, projection.free_at_most(trained))
  own = parts.flatten(trained).keys()
  if not own <= parts.flatten(base).keys():
    stored = adapter.peft_share * free
    return Budget(n, free, _adapter_bytes(stored, len(own)))
  if free < n:
    return Budget(n, free, subsets.predicted_bytes(base, free, about))
  return Budget(n, free, _FLOAT32 * free)


def _adapter_bytes(size: int, tensors: int) -> int:
  """Returns the approximate bytes of an adapter's file, in PEFT's format."""
  # The header has the tensors' names and offsets, and the seed's record.
  return _FLOAT32 * size + 130 * tensors + 400


def _size(shapes: PyTree) -> int:
  return sum(leaf.size for leaf in jax.tree.leaves(shapes))


class Row(NamedTuple):
  """A row of the table.

  Attributes:
    method: the method's name.
    setting: what sets its budget.
    budget: its budget.
    state_bytes: the bytes of the states of AdaFactor and of the method; None if
      not counted.
    own_bytes: the bytes of the file that its authors use; None if that is a
      whole model, or ours.
  """

  method: str
  setting: str
  budget: Budget
  state_bytes: int | None = None
  own_bytes: int | None = None


def own(
  network: api.Network,
  projection: methods.Projection | None = None,
  adapter: adapters.Adapter | None = None,
  trained: Sequence[str] | None = None,
) -> Row | None:
  """Returns the budget of the method that a gin file describes.

  Args:
    network: the model.
    projection: PROJECTION; None if the gin file has no method.
    adapter: ADAPTER.
    trained: TRAINED.

  Returns:
    The row; None if there is no method.

  Raises:
    UserError: the arguments contradict each other.
  """
  if projection is None:
    return None
  whole = adapted.with_adapter(network, adapter)
  expressions = trained_lib.expressions(whole, projection, trained)
  shapes, _ = parts.split(api.shapes(whole), expressions)
  name = projection.settings()['method']
  if not projection.constrains:
    name = type(adapter).__name__ if adapter else ' '.join(trained or [name])
  fields: Any = dataclasses.fields(cast(Any, projection))
  changed = {
    field.name: value
    for field in fields
    if (value := getattr(projection, field.name)) != field.default
  }
  setting = ' '.join(f'{key}={value}' for key, value in changed.items())
  budget = of_run(
    api.shapes(network), shapes, projection, adapter=whole.adapter
  )
  return Row(name, setting, budget)


def rows(
  network: api.Network,
  own: Row | None = None,
  fraction: values.Share | None = None,
  epsilons: Sequence[values.Share] = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7),
  ranks: Sequence[values.Positive] = (1, 2, 4, 8, 16, 32, 50),
  lengths: Sequence[values.Positive] = (1, 2, 5, 10, 20, 50, 100),
  targets: str = lora.LoRA.targets,
  vera_ranks: Sequence[values.Positive] = (256, 1024),
  family: Sequence[Row] = (),
) -> list[Row]:
  """Returns the budgets of all methods that train at least one parameter.

  Args:
    network: the model.
    own: a row to put first.
    fraction: a share of the parameters. Of each method, only the setting that
      is nearest to it is listed.
    epsilons: EPSILON of `dst` and `random`.
    ranks: LORA_RANK of `lora` (and `rslora` and `pissa`) and of `dora`.
    lengths: PROMPT_LENGTH of `prompt`.
    targets: LORA_TARGETS.
    vera_ranks: LORA_RANK of `vera`.
    family: rows of the other sparse methods.

  Raises:
    UserError: a number is out of range, or `targets` matches no linear map.
  """
  base = api.shapes(network)
  n = _size(base)
  one: dict[str, Any] = {'rank': 1, 'targets': targets}
  if not _added(network, lora.LoRA(**one)):
    raise UserError(f'LORA_TARGETS: no linear map matches {targets!r}')
  if fraction is not None:
    values.check({'FRACTION': (fraction, values.Share)})
    epsilons = [fraction]
  sized = [
    _Sized('lora', 'LORA_RANK', ranks, lora.LoRA(**one)),
    _Sized('dora', 'LORA_RANK', ranks, dora.DoRA(**one), '.*/lora_[ab]'),
    _Sized('vera', 'LORA_RANK', vera_ranks, vera.VeRA(**one), '.*/vera_d'),
    _Sized('prompt', 'PROMPT_LENGTH', lengths, prompts.Prompt(length=1)),
  ]

  def subset_row(name: str, setting: str, free: int) -> Row:
    size = subsets.predicted_bytes(base, free)
    return Row(name, setting, Budget(n, free, size))

  factors = _added(network, ia3.IA3())
  found = [
    *([own] if own else []),
    *(
      subset_row(name, f'EPSILON={epsilon:g}', free)
      for name in ('dst', 'random')
      for epsilon in epsilons
      for free in [sum(budgets.largest_remainder([n], epsilon))]
    ),
    *family,
    Row('full', '', Budget(n, n, _FLOAT32 * n)),
    subset_row('head_only', '', _size(_matching(base, network.output_matrix))),
    subset_row('norms', '', _size(_matching(base, NORMS))),
    Row('ia3', '', _adapter_budget(n, _size(factors), len(factors))),
    *(row for method in sized for row in method.rows(network, n, fraction)),
  ]
  return [row for row in found if row.budget.free]


class _Sized(NamedTuple):
  """A method whose adapter has a rank or a length.

  Attributes:
    name: of its file.
    macro: the one that sets the rank or length.
    numbers: the values of the macro.
    smallest: its adapter of rank or length 1.
    growing: regular expression of the parameters that grow with the number.
  """

  name: str
  macro: str
  numbers: Sequence[int]
  smallest: adapters.Adapter
  growing: str = '.*'

  def rows(
    self, network: api.Network, n: int, fraction: float | None
  ) -> list[Row]:
    """Returns a row for each number; only the nearest one to a fraction.

    Args:
      network: the model, which has n parameters.
      n: see `network`.
      fraction: see `budget.rows`.
    """
    shapes = _added(network, self.smallest)
    first, each = _size(shapes), _size(_matching(shapes, self.growing))
    numbers = self.numbers
    if fraction is not None:
      numbers = [max(1, 1 + round((fraction * n - first) / max(each, 1)))]
    return [
      Row(self.name, f'{self.macro}={k}', _adapter_budget(n, free, len(shapes)))
      for k in numbers
      for free in [first + (k - 1) * each]
    ]


def _adapter_budget(n: int, free: int, tensors: int) -> Budget:
  return Budget(n, free, _adapter_bytes(free, tensors))


def _added(network: api.Network, adapter: adapters.Adapter) -> dict[str, Any]:
  """Returns path -> shape of what an adapter trains."""
  shapes = api.shapes(adapted.with_adapter(network, adapter))
  return _matching(shapes, adapter.added)


def _matching(shapes: PyTree, pattern: str | None) -> dict[str, Any]:
  """Returns path -> shape where the path matches; none if `pattern` is None."""
  return {
    path: leaf
    for path, leaf in parts.flatten(shapes).items()
    if pattern is not None and re.fullmatch(pattern, path)
  }


def show(found: Sequence[Row]) -> None:
  """Prints what `rows` returned."""
  print(f'{found[0].budget.parameters:,} parameters')
  # A user's own method may have longer names.
  of_name = max(10, *(len(row.method) + 1 for row in found))
  of_setting = max(20, *(len(row.setting) + 1 for row in found))
  titles = 'free', 'fraction', 'bytes', 'own bytes', 'at most', 'states'
  print(
    f'{"method":{of_name}}{"setting":{of_setting}}'
    f'{"{:>14}{:>14}{:>16}{:>14}{:>14}{:>14}".format(*titles)}'
  )
  for row in found:
    budget = row.budget
    more = row.own_bytes, budget.most, row.state_bytes
    print(
      f'{row.method:{of_name}}{row.setting:{of_setting}}{budget.free:14,}'
      f'{budget.fraction:14.6%}{budget.file_bytes:16,}'
      + ''.join(f'{"-" if x is None else f"{x:,}":>14}' for x in more)
    )
