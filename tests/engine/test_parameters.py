"""Parameters of networks: what is traced to make them."""

from flax import linen as nn
import jax
import numpy as np
import pytest
import tiny_t5

from dst_t5x.engine import parameters
from dst_t5x.engine import partitioning
from dst_t5x.models import api
from dst_t5x.models.t5 import network

_TRACED = []


class _Counting(network.Transformer):
  """T5 that counts how often it is traced."""

  @nn.nowrap
  def initialize(self, key):
    _TRACED.append(self)
    return super().initialize(key)


@pytest.fixture(autouse=True)
def traced():
  jax.clear_caches()
  _TRACED.clear()
  return _TRACED


def test_shapes_of_equal_networks_are_traced_once(traced):
  first, second = (api.shapes(_Counting(tiny_t5.CONFIG)) for _ in range(2))
  assert first == second == tiny_t5.shapes()
  assert len(traced) == 1


def test_equal_networks_are_initialized_by_one_program(traced):
  def initialized():
    space = parameters.ParameterSpace(
      _Counting(tiny_t5.CONFIG), partitioning.Partitioner()
    )
    return space.initialize(0)

  first = initialized()
  once = len(traced)
  second = initialized()
  assert len(traced) == once
  jax.tree.map(np.testing.assert_array_equal, first, second)
