"""Paths of parameters, of layers one by one and of stacked ones."""

import jax
import numpy as np
import pytest

from dst_t5x.core import tree_paths


@pytest.mark.parametrize(
  ('path', 'shape', 'slices'),
  [
    ('a/layers/w', (2, 3), ['a/layers_0/w', 'a/layers_1/w']),
    ('layers/norm/scale', (1,), ['layers_0/norm/scale']),
    ('a/layers_1/w', (2, 3), None),
    ('a/layers', (2, 3), None),  # A tensor of this name is no stack.
    ('a/layers/w', (), None),
    ('a/players/w', (2, 3), None),
  ],
)
def test_slices_of_stacked_layers(path, shape, slices):
  is_stacked, paths = tree_paths.slice_paths(path, shape)
  assert is_stacked == tree_paths.is_stacked(path, shape) == bool(slices)
  assert paths == (slices or [path])
  for number, of_slice in enumerate(slices or []):
    assert tree_paths.stacked_path(of_slice) == (path, str(number))


def test_what_is_in_no_layer_has_no_place_in_a_stack():
  for path in ('a/w', 'layers_3', 'a/layers_x/w', 'layers_/w', 'xlayers_1/w'):
    assert tree_paths.stacked_path(path) is None
  # Of several only the first counts, as where they are stacked.
  assert tree_paths.stacked_path('layers_1/layers_2/w') == (
    'layers/layers_2/w',
    '1',
  )


def test_layers_and_paths_of_leaves():
  assert tree_paths.is_layer(tree_paths.layer(12))
  assert not any(map(tree_paths.is_layer, ('layers', 'layers_', 'layers_1a')))
  tree = {'a': {'layers_0': {'w': np.zeros(2)}}, 'b': [np.zeros(1)]}
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  assert [tree_paths.path_of(path) for path, _ in leaves] == [
    'a/layers_0/w',
    'b/0',
  ]
