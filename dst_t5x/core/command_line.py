"""Options of commands: numbers in their ranges, and one line for a mistake.

    parser = command_line.Parser(prog='python -m launch.x', description=__doc__)
    parser.add_argument('--parallel', type=command_line.whole(1), default=1)
    parser.add_argument('--every', type=command_line.number(60), default=2.0)

A number out of its range is a mistake of the command line like any other, found
before any work; so are NaN and the infinities, which `float` would take.
"""

import argparse
from collections.abc import Callable
import math
from typing import Any, NoReturn

YEAR = 365 * 24 * 60 * 60  # In seconds; what can wait can wait for so long.


class Parser(argparse.ArgumentParser):
  """A parser whose mistakes are one line; `help` shows texts as they stand."""

  def __init__(self, **options: Any) -> None:
    """As argparse's."""
    shown = {'formatter_class': argparse.RawDescriptionHelpFormatter}
    super().__init__(**(shown | options))

  def error(self, message: str) -> NoReturn:
    """Ends the program with status 2, without the usage: --help has it."""
    self.exit(2, f'error: {message} (see --help)\n')


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
  """Returns a type for argparse: whole numbers of a range.

  Args:
    least: the smallest of them.
    most: the largest of them; without, there is none.
  """
  range_ = f'of at least {least:,}'
  if most is not None:
    range_ = f'from {least:,} to {most:,}'

  def parse(text: str) -> int:
    try:
      value = int(text)
    except ValueError:
      value = least - 1
    if value < least or (most is not None and value > most):
      raise argparse.ArgumentTypeError(
        f'must be a whole number {range_}, not {text!r}'
      )
    return value

  return parse


def number(most: float, *, with_zero: bool = False) -> Callable[[str], float]:
  """Returns a type for argparse: finite numbers above 0, or from it.

  Args:
    most: the largest of them.
    with_zero: whether 0 is one of them.
  """
  range_ = f'{"from" if with_zero else "above"} 0'

  def parse(text: str) -> float:
    try:
      value = float(text)
    except ValueError:
      value = math.nan
    # Not the other way round: NaN is neither below nor above.
    if not (0 < value <= most or (with_zero and value == 0)):
      raise argparse.ArgumentTypeError(
        f'must be a number {range_} to {most:,.15g}, not {text!r}'
      )
    return value

  return parse
