"""A binary with something to configure, for the tests of the configuration."""

from collections.abc import Sequence
import dataclasses
from typing import Any

import gin

from dst_t5x.core import values

LIMIT = 3


@dataclasses.dataclass(frozen=True)
class ToyMethod:
  epsilon: float
  distance: str = 'absolute'


class ToyNetwork:
  def __init__(self, layers: int = 2, inner: Any = None):
    self.layers = layers
    self.inner = inner


def rate(base: float = 1.0) -> float:
  return base


@gin.configurable
def registered(rate: float = 1.0) -> float:
  """Code may call this without gin's knowledge."""
  return rate


def shared(steps: int = 1) -> dict[str, Any]:
  """A name that another module has too."""
  return dict(locals())


def fit(
  model_dir: str,
  steps: int = 10,
  method: Any = None,
  network: Any = None,
  extras: Any = None,
) -> dict[str, Any]:
  """Returns what gin gave it."""
  return dict(locals())


def typed(
  folder: values.Path,
  seed: values.Path | None = None,
  churn: bool = True,
  rate: values.BelowOne = 0.0,
  names: Sequence[str] = (),
  method: ToyMethod | None = None,
  **others: Any,
) -> dict[str, Any]:
  """Returns what gin gave it."""
  return dict(locals())


def score(network: Any, steps: int = 1) -> dict[str, Any]:
  """Returns what gin gave it."""
  return dict(locals())
