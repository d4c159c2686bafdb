"""Command-line options: numbers with a range, and one-line error messages.

    parser = command_line.Parser(prog='python -m launch.x', description=__doc__)
    parser.add_argument('--parallel', type=command_line.whole(1), default=1)
    parser.add_argument('--every', type=command_line.number(60), default=2.0)

The parser refuses a number out of its range before any work starts. It also
refuses NaN and the infinities, which `float` accepts. argparse has no types for
ranges.
"""

import argparse
from collections.abc import Callable
import math
from typing import Any, NoReturn

YEAR = 365 * 24 * 60 * 60  # Seconds; the upper limit of waiting times.


class Parser(argparse.ArgumentParser):
  """A parser with one-line error messages; --help keeps line breaks."""

  def __init__(self, **options: Any) -> None:
    """Takes the arguments of `argparse.ArgumentParser`."""
    shown = {'formatter_class': argparse.RawDescriptionHelpFormatter}
    super().__init__(**(shown | options))

  def error(self, message: str) -> NoReturn:
    """Prints one line and exits with status 2; --help prints the usage."""
    self.exit(2, f'error: {message} (see --help)\n')


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
  """Returns a type for argparse: whole numbers in a range.

  Args:
    least: the smallest number.
    most: the largest number; None for no limit.
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
  """Returns a type for argparse: finite numbers in (0, most] or [0, most].

  Args:
    most: the largest number.
    with_zero: whether 0 is allowed.
  """
  range_ = f'{"from" if with_zero else "above"} 0'

  def parse(text: str) -> float:
    try:
      value = float(text)
    except ValueError:
      value = math.nan
    # Comparisons with NaN are false, so the range has to be tested, not its
    # complement.
    if not (0 < value <= most or (with_zero and value == 0)):
      raise argparse.ArgumentTypeError(
        f'must be a number {range_} to {most:,.15g}, not {text!r}'
      )
    return value

  return parse
