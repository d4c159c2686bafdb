"""Stacking and unstacking of layers are exact inverses."""

import jax.numpy as jnp
from networks import flat
from networks import random_params
from networks import tiny
import numpy as np
import pytest

from dst_t5x.core import errors
from dst_t5x.core import stacking


def assert_equal(first, second):
  assert flat(first).keys() == flat(second).keys()
  for path, value in flat(first).items():
    np.testing.assert_array_equal(value, flat(second)[path], err_msg=path)


def test_there_and_back():
  params = random_params(tiny())
  stacked = stacking.stack_layers(params)
  kernel = stacked['decoder']['layers']['mlp']['wo']['kernel']
  assert isinstance(kernel, np.ndarray)
  assert kernel.shape == (3, 20, 16)
  assert_equal(stacking.unstack_layers(stacked), params)
  scanned = random_params(tiny(scan_layers=True))
  assert_equal(stacking.stack_layers(stacking.unstack_layers(scanned)), scanned)
  assert flat(stacked).keys() == flat(scanned).keys()


def test_what_is_done_already_stays():
  params = random_params(tiny())
  stacked = stacking.stack_layers(params)
  assert_equal(stacking.stack_layers(stacked), stacked)
  assert_equal(stacking.unstack_layers(params), params)


def test_layers_are_ordered_as_numbers():
  params = {f'layers_{i}': {'scale': np.float32([i])} for i in range(12)}
  stacked = stacking.stack_layers(params)['layers']['scale']
  np.testing.assert_array_equal(stacked[:, 0], np.arange(12))


def test_jax_arrays_stay_jax_arrays():
  stacked = stacking.stack_layers({'layers_0': {'x': jnp.ones(2)}})
  assert isinstance(stacked['layers']['x'], jnp.ndarray)


def test_a_missing_layer_is_named():
  params = {'a': {'layers_0': {'x': np.ones(1)}, 'layers_2': {'x': np.ones(1)}}}
  with pytest.raises(errors.UserError, match='layers_1 is missing'):
    stacking.stack_layers(params)


@pytest.mark.parametrize(
  ('other', 'message'),
  [
    ({'x': np.ones(3)}, r'layers_1: its x is \(3,\), in layers_0 it is \(2,\)'),
    ({}, 'its x is missing'),
    ({'x': np.ones(2), 'y': np.ones(1)}, 'in layers_0 it is missing'),
  ],
)
def test_unlike_layers_are_named(other, message):
  with pytest.raises(errors.UserError, match=message):
    stacking.stack_layers({'layers_0': {'x': np.ones(2)}, 'layers_1': other})
