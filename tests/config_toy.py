"""A binary with something to configure, for the tests of the configuration."""

import dataclasses
from typing import Any

import gin

LIMIT = 3


@dataclasses.dataclass(frozen=True)
class Method:
  epsilon: float
  distance: str = 'absolute'


class Network:
  def __init__(self, layers: int = 2, inner: Any = None):
    self.layers = layers
    self.inner = inner


def schedule(base: float = 1.0) -> float:
  return base


@gin.configurable
def registered(rate: float = 1.0) -> float:
  """Code may call this without gin's knowledge."""
  return rate


def train(
  model_dir: str,
  steps: int = 10,
  method: Any = None,
  network: Any = None,
  extras: Any = None,
) -> dict[str, Any]:
  """Returns what gin gave it."""
  return dict(locals())


def evaluate(network: Any, steps: int = 1) -> dict[str, Any]:
  """Returns what gin gave it."""
  return dict(locals())
