"""Silos: the silo of each component, in stacked and unstacked trees."""

import decoder_only
import jax
import numpy as np
import pytest
import reference
import tiny_t5

from dst_t5x.core import errors
from dst_t5x.core import parts
from dst_t5x.core import stacking
from dst_t5x.core import tree_paths
from dst_t5x.method import projection
from dst_t5x.method import silos
from dst_t5x.models import api

LAYERS = 12  # So that layer 10 is not between 1 and 2.


def _tree():
  """Returns a tree with T5's paths, of arrays of different sizes."""
  r = np.random.default_rng(0)
  sizes = iter(range(2, 1000))

  def tensor(*shape):
    return r.standard_normal((next(sizes), *shape))

  layer_shapes = {
    'attention': {'query': {'kernel': (7, 4)}, 'out': {'kernel': (4,)}},
    'mlp': {'wi_0': {'kernel': (3, 2)}, 'wo': {'kernel': (2, 1, 3)}},
    'pre_mlp_layer_norm': {'scale': (5,)},
  }
  is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
  stack = {
    f'layers_{i}': jax.tree.map(
      lambda shape: r.standard_normal(shape), layer_shapes, is_leaf=is_shape
    )
    for i in range(LAYERS)
  }
  return {
    'decoder': {**stack, 'logits_dense': {'kernel': tensor(3)}},
    'encoder': {**stack, 'encoder_norm': {'scale': tensor()}},
    'scalar': np.float32(3),
    'token_embedder': {'embedding': tensor(9)},
  }


def test_against_the_reference():
  tree = _tree()
  layout = silos.make_layout(tree, 'per_module_and_layer')
  expected = reference.silos(tree)
  assert layout.names == tuple(expected)
  assert layout.sizes == tuple(
    sum(size for _, size in tensors) for tensors in expected.values()
  )
  assert layout.size == sum(x.size for x in jax.tree.leaves(tree))
  assert sum(layout.budgets(0.1)) == round(0.1 * layout.size)
  offsets = {}
  for tensors in expected.values():
    start = 0
    for path, size in tensors:
      offsets[path] = start
      start += size
  for leaf in layout.leaves:
    assert not leaf.stacked
    assert layout.names[leaf.silos[0]] == reference.silo_of(leaf.path)
    assert leaf.offsets == (offsets[leaf.path],)


def test_stacked_trees_have_the_same_silos():
  tree = _tree()
  stacked = stacking.stack_layers(tree)
  layout = silos.make_layout(tree, 'per_module_and_layer')
  other = silos.make_layout(stacked, 'per_module_and_layer')
  assert (other.names, other.sizes) == (layout.names, layout.sizes)
  slices = {}
  for leaf, x in zip(other.leaves, jax.tree.leaves(stacked), strict=True):
    is_stacked, paths = tree_paths.slice_paths(leaf.path, x.shape)
    assert is_stacked == leaf.stacked == ('/layers/' in leaf.path)
    slices |= zip(
      paths, zip(leaf.silos, leaf.offsets, strict=True), strict=True
    )
  assert slices == {
    leaf.path: (leaf.silos[0], leaf.offsets[0]) for leaf in layout.leaves
  }


def test_positions_do_not_depend_on_what_a_silo_is(monkeypatch):
  monkeypatch.setitem(silos.SILOS, 'all', lambda path: 'all')
  layout = silos.make_layout(_tree(), 'all')
  other = silos.make_layout(stacking.stack_layers(_tree()), 'all')
  offsets = sorted(o for leaf in layout.leaves for o in leaf.offsets)
  assert offsets == sorted(o for leaf in other.leaves for o in leaf.offsets)
  assert len(layout.names) == 1
  firsts = {leaf.path: leaf.offsets[0] for leaf in layout.leaves}
  stack = firsts['encoder/layers_2/mlp/wo/kernel']
  assert stack < firsts['encoder/layers_10/mlp/wo/kernel']
  stacked = {leaf.path: leaf.offsets for leaf in other.leaves}
  assert stacked['encoder/layers/mlp/wo/kernel'][2] == stack


@pytest.mark.parametrize(
  ('path', 'silo'),
  [
    ('encoder/layers_3/attention/query/kernel', 'encoder/layers_3/attention'),
    ('encoder/layers_3/norm/scale', 'encoder/layers_3/norm'),
    ('encoder/layers_3/scale', 'encoder/layers_3/scale'),
    ('encoder/relpos_bias/rel_embedding', 'encoder/relpos_bias'),
    ('decoder/logits_dense/kernel', 'decoder/logits_dense'),
    ('token_embedder/embedding', 'token_embedder'),
    ('my_layers_3/a/b/c', 'my_layers_3/a/b'),
    ('temperature', 'temperature'),
  ],
)
def test_per_module_and_layer(path, silo):
  assert silos.per_module_and_layer(path) == silo == reference.silo_of(path)


def test_silos_of_t5_small():
  shapes = tiny_t5.shapes(tiny_t5.SMALL)
  layout = silos.make_layout(shapes, 'per_module_and_layer')
  # Attention, feed-forward and two norms; two attentions and three norms; the
  # embedding, the output, and of each stack the final norm and the bias.
  assert len(layout.names) == 8 * 4 + 8 * 6 + 6
  assert layout.size == 76_961_152
  assert layout.names[:5] == (
    'decoder/decoder_norm',
    'decoder/layers_0/encoder_decoder_attention',
    'decoder/layers_0/mlp',
    'decoder/layers_0/pre_cross_attention_layer_norm',
    'decoder/layers_0/pre_mlp_layer_norm',
  )
  mlp = layout.names.index('encoder/layers_7/mlp')
  assert layout.sizes[mlp] == 3 * 512 * 1024


@pytest.mark.parametrize('family', ['gemma3', 'qwen2'])
def test_silos_of_decoder_only_networks(family):
  """Modules of each layer, and what is outside of the layers."""
  shapes = api.shapes(decoder_only.tiny(family))
  layers = decoder_only.tiny(family).config.num_layers
  layout = silos.make_layout(shapes, 'per_module_and_layer')
  norms = ['pre_mlp_layer_norm', 'pre_self_attention_layer_norm']
  if family == 'gemma3':
    norms += [f'post_{name.removeprefix("pre_")}' for name in norms]
  modules = ['mlp', 'self_attention', *norms]
  assert set(layout.names) == {
    'decoder/decoder_norm',
    'token_embedder',
    *(f'decoder/layers_{i}/{name}' for i in range(layers) for name in modules),
  }
  by_module = silos.make_layout(shapes, 'per_module')
  assert set(by_module.names) == {
    'decoder/decoder_norm',
    'token_embedder',
    *(f'decoder/{name}' for name in modules),
  }
  stacked = api.shapes(decoder_only.tiny(family, scan_layers=True))
  for rules, found in (
    ('per_module_and_layer', layout),
    ('per_module', by_module),
  ):
    other = silos.make_layout(stacked, rules)
    assert (other.names, other.sizes) == (found.names, found.sizes)
  # All of attention is one silo: maps, biases, norms of queries and keys.
  attention = parts.flatten(shapes['decoder']['layers_1']['self_attention'])
  silo = layout.names.index('decoder/layers_1/self_attention')
  assert layout.sizes[silo] == sum(x.size for x in attention.values())


@pytest.mark.parametrize('rules', ['per_module', 'per_module_and_layer'])
@pytest.mark.parametrize('distance', ['inverse_relative', 'absolute', 'random'])
def test_budgets_of_decoder_only_networks_are_exact(rules, distance):
  model = decoder_only.tiny('gemma3')
  seed = decoder_only.random_params(model)
  random = np.random.default_rng(1)
  moved = jax.tree.map(
    lambda x: x + random.normal(0, 0.1, x.shape).astype(np.float32), seed
  )
  chosen = projection.SubsetProjection(0.03, distance=distance, silos=rules)
  project = chosen.prepare(jax.eval_shape(lambda: seed))
  tuned, _ = jax.jit(
    lambda new, old: project.apply(new, old, project.init(old))
  )(moved, seed)
  layout = silos.make_layout(seed, rules)
  free = dict.fromkeys(layout.names, 0)
  tuned, flat = parts.flatten(tuned), parts.flatten(seed)
  for path, x in tuned.items():
    is_free = np.asarray(x) != flat[path]
    np.testing.assert_array_equal(
      x[is_free], parts.flatten(moved)[path][is_free]
    )
    free[silos.SILOS[rules](path)] += int(is_free.sum())
  assert list(free.values()) == layout.budgets(0.03)
  assert sum(free.values()) == round(0.03 * layout.size)


def test_unknown_silos_and_too_large_ones():
  with pytest.raises(
    errors.UserError, match=r'did you mean .per_module_and_la'
  ):
    silos.make_layout({}, 'per_module_and_layers')
  large = {'a': {'b': jax.ShapeDtypeStruct((2**16, 2**16), np.float32)}}
  with pytest.raises(errors.UserError, match=r"^'a/b' has 4294967296 comp"):
    silos.make_layout(large, 'per_module_and_layer')
