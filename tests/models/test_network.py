"""T5 1.1: its parameters, and the logits of all its variants."""

import functools
import pathlib

from flax.linen import partitioning
import gin
import jax
import jax.numpy as jnp
from networks import TINY
from networks import VOCAB
from networks import flat
from networks import logits
from networks import random_batch
from networks import random_params
from networks import tiny
import numpy as np
import pytest

from dst_t5x.checkpoints import hf_checkpoint
from dst_t5x.core import stacking
from dst_t5x.models.t5 import attention
from dst_t5x.models.t5 import network

SIZES = {
  'tiny': 518_240,
  'small': 76_961_152,
  'base': 247_577_856,
  'large': 783_150_080,
  'xl': 2_849_757_184,
  'xxl': 11_135_332_352,
}


def configured(repository, size, *bindings):
  path = repository / 'gin' / 'models' / f't5_1_1_{size}.gin'
  gin.clear_config()
  try:
    gin.add_config_file_search_path(str(repository))
    gin.parse_config_files_and_bindings([str(path)], list(bindings))
    return gin.query_parameter('%ARCHITECTURE').scoped_configurable_fn()
  finally:
    gin.clear_config()


def abstract_variables(model):
  tokens = jnp.ones((1, 4), jnp.int32)
  return jax.eval_shape(
    lambda key: model.init(key, tokens, tokens, tokens, enable_dropout=False),
    jax.random.key(0),
  )


def shapes(tree):
  return {path: leaf.shape for path, leaf in flat(tree).items()}


def expected_shapes(config):
  """Returns the paths and shapes of T5X's `t5x.examples.t5.network`."""
  joined = config.num_heads * config.head_dim
  attend = {
    'query/kernel': (config.emb_dim, joined),
    'key/kernel': (config.emb_dim, joined),
    'value/kernel': (config.emb_dim, joined),
    'out/kernel': (joined, config.emb_dim),
  }
  mlp = {
    'mlp/wi_0/kernel': (config.emb_dim, config.mlp_dim),
    'mlp/wi_1/kernel': (config.emb_dim, config.mlp_dim),
    'mlp/wo/kernel': (config.mlp_dim, config.emb_dim),
  }
  result = {
    'token_embedder/embedding': (config.vocab_size, config.emb_dim),
    'decoder/logits_dense/kernel': (config.emb_dim, config.vocab_size),
  }
  stacks = {
    'encoder': (config.num_encoder_layers, {'attention': 'attention'}),
    'decoder': (
      config.num_decoder_layers,
      {
        'self_attention': 'self_attention',
        'encoder_decoder_attention': 'cross_attention',
      },
    ),
  }
  for stack, (num_layers, attentions) in stacks.items():
    result[f'{stack}/{stack}_norm/scale'] = (config.emb_dim,)
    result[f'{stack}/relpos_bias/rel_embedding'] = (config.num_heads, 32)
    for i in range(num_layers):
      layer = f'{stack}/layers_{i}'
      for path, shape in mlp.items():
        result[f'{layer}/{path}'] = shape
      for norm in [*attentions.values(), 'mlp']:
        result[f'{layer}/pre_{norm}_layer_norm/scale'] = (config.emb_dim,)
      for name in attentions:
        for path, shape in attend.items():
          result[f'{layer}/{name}/{path}'] = shape
  return result


def test_parameters_are_those_of_t5x():
  model = tiny()
  params = abstract_variables(model)['params']
  assert shapes(params) == expected_shapes(model.config)
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {
    jnp.dtype('float32')
  }


def test_parameters_match_a_public_t5x_checkpoint(shared_data):
  folder = shared_data / 'checkpoints' / 't5_1_1_tiny_legacy' / 'checkpoint_3'
  stored = {
    path.name.removeprefix('target.').replace('.', '/')
    for path in pathlib.Path(folder).glob('target.*')
  }
  model = tiny(
    vocab_size=32128,
    emb_dim=4,
    num_heads=2,
    head_dim=2,
    mlp_dim=8,
    num_decoder_layers=2,
  )
  ours = shapes(abstract_variables(model)['params'])
  # Vectors and small tables lie inside the index file, kernels in folders.
  assert stored
  assert stored <= ours.keys()
  assert {path for path in ours if path.endswith('/kernel')} <= stored


@pytest.mark.parametrize('size', SIZES)
def test_sizes(repository, size):
  model = configured(repository, size)
  params = abstract_variables(model)['params']
  count = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(params))
  assert count == SIZES[size]
  path = repository / 'gin' / 'models' / f't5_1_1_{size}.gin'
  assert f'{count:,} parameters' in path.read_text(encoding='utf-8')
  unstacked = jax.eval_shape(stacking.unstack_layers, params)
  assert shapes(unstacked) == expected_shapes(model.config)


def test_model_macros_can_be_overridden(repository):
  model = configured(
    repository, 'small', 'DROPOUT_RATE=0.0', "ACTIVATION_DTYPE='bfloat16'"
  )
  assert model.config.dropout_rate == 0.0
  assert model.config.dtype == 'bfloat16'
  assert configured(repository, 'xl').config.dtype == 'bfloat16'
  assert configured(repository, 'small').config.dropout_rate == 0.1


def test_every_parameter_has_logical_axes():
  for scan in (False, True):
    variables = abstract_variables(tiny(scan_layers=scan))
    axes = {
      path.removesuffix('_axes'): leaf.names
      for path, leaf in flat(variables['params_axes']).items()
    }
    params = flat(variables['params'])
    assert axes.keys() == params.keys()
    assert all(len(axes[path]) == params[path].ndim for path in params)
  assert axes['encoder/layers/attention/query/kernel'] == (
    'layers',
    'embed',
    'joined_kv',
  )
  assert axes['decoder/relpos_bias/rel_embedding'] == (
    'heads',
    'relpos_buckets',
  )


@pytest.mark.parametrize('bidirectional', [True, False])
def test_relative_position_buckets_equal_hugging_face(bidirectional):
  torch = pytest.importorskip('torch')
  modeling_t5 = pytest.importorskip('transformers.models.t5.modeling_t5')
  positions = torch.arange(700)
  theirs = modeling_t5.T5Attention._relative_position_bucket(
    positions[None, :] - positions[:, None], bidirectional=bidirectional
  )
  ours = attention.relative_position_buckets(700, bidirectional=bidirectional)
  np.testing.assert_array_equal(ours, theirs.numpy())


@pytest.mark.parametrize(
  'batch', [(1, 1, 1), (3, 9, 5), (4, 17, 30), (2, 300, 280)]
)
@pytest.mark.parametrize('heads', [(3, 6), (4, 4)])
def test_logits_equal_hugging_face(tmp_path, batch, heads):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  model = tiny(num_heads=heads[0], head_dim=heads[1])
  params = random_params(model)
  hf_checkpoint.save(tmp_path / 'peer', params, model)
  peer = transformers.T5ForConditionalGeneration.from_pretrained(
    tmp_path / 'peer'
  )
  peer.eval()
  data = random_batch(*batch)

  def tensor(name):
    return torch.from_numpy(data[name]).long()

  with torch.no_grad():
    theirs = peer(
      input_ids=tensor('encoder_input_tokens'),
      attention_mask=(tensor('encoder_input_tokens') > 0).long(),
      decoder_input_ids=tensor('decoder_input_tokens'),
    ).logits.numpy()
  ours = logits(model, params, data)
  # Padded positions of the targets are masked differently and mean nothing.
  real = data['decoder_target_tokens'] > 0
  assert np.abs(ours).max() > 0.5
  np.testing.assert_allclose(ours[real], theirs[real], atol=1e-4)


def test_logits_through_the_embeddings():
  model = tiny(logits_via_embedding=True)
  params = random_params(model)
  assert 'logits_dense' not in params['decoder']
  data = random_batch(2, 5, 4)
  ours = logits(model, params, data)
  untied = tiny()
  table = params['token_embedder']['embedding']
  projection = {'kernel': table.T / np.sqrt(TINY['emb_dim'])}
  params['decoder']['logits_dense'] = projection
  np.testing.assert_allclose(ours, logits(untied, params, data), atol=1e-5)


def test_packed_equals_unpacked():
  model, data = tiny(), random_batch(2, 9, 7, seed=3)
  params = random_params(model)
  alone = logits(model, params, data)
  packed = {name: tokens.reshape(1, -1) for name, tokens in data.items()}
  for side, length in [('encoder', 9), ('decoder', 7)]:
    given = data[
      'encoder_input_tokens' if side == 'encoder' else 'decoder_target_tokens'
    ]
    segments = np.where(given > 0, [[1], [2]], 0).astype(np.int32)
    packed[f'{side}_segment_ids'] = segments.reshape(1, -1)
    packed[f'{side}_positions'] = np.tile(np.arange(length), 2)[None]
  together = logits(model, params, packed).reshape(alone.shape)
  real = data['decoder_target_tokens'] > 0
  np.testing.assert_allclose(together[real], alone[real], atol=1e-5)


def test_segment_ids_of_one_side_are_refused():
  model, data = tiny(), random_batch(1, 4, 4)
  data['encoder_segment_ids'] = np.ones((1, 4), np.int32)
  with pytest.raises(ValueError, match='both sides'):
    logits(model, random_params(model), data)


def loss_gradient(model, params, data):
  def loss(params):
    rngs = {'dropout': jax.random.key(0)}
    outputs = model.apply({'params': params}, **data, rngs=rngs)
    scores = jax.nn.log_softmax(outputs)
    targets = data['decoder_target_tokens']
    picked = jnp.take_along_axis(scores, targets[..., None], axis=-1)[..., 0]
    return -jnp.sum(picked * (targets > 0))

  return jax.jit(jax.value_and_grad(loss))(params)


def assert_trees_close(first, second, **tolerance):
  assert flat(first).keys() == flat(second).keys()
  for path, value in flat(first).items():
    np.testing.assert_allclose(
      value, flat(second)[path], err_msg=path, **tolerance
    )


@pytest.mark.parametrize(
  'changes',
  [
    {'scan_layers': True},
    {'remat': True},
    {'scan_layers': True, 'remat': True},
  ],
)
def test_scanning_and_rematerialising_change_nothing(changes):
  options = {'dropout_rate': 0.3}
  plain, variant = tiny(**options), tiny(**options, **changes)
  params, data = random_params(plain), random_batch(3, 8, 6)
  loss, gradient = loss_gradient(plain, params, data)
  if variant.scan_layers:
    params = stacking.stack_layers(params)
  other_loss, other_gradient = loss_gradient(variant, params, data)
  if variant.scan_layers:
    other_gradient = stacking.unstack_layers(other_gradient)
  np.testing.assert_allclose(other_loss, loss, rtol=1e-6)
  assert_trees_close(other_gradient, gradient, rtol=1e-4, atol=1e-5)


def test_remat_recomputes_the_layers():
  """The backward pass of a rematerialised network stores fewer values."""
  data = random_batch(3, 8, 6)

  def residuals(model):
    def backward(params):
      _, pullback = jax.vjp(
        lambda params: model.apply(
          {'params': params}, **data, enable_dropout=False
        ),
        params,
      )
      return pullback

    saved = jax.eval_shape(backward, random_params(model))
    return sum(x.size for x in jax.tree.leaves(saved))

  assert residuals(tiny(remat=True)) < 0.7 * residuals(tiny())


def test_scanned_layers_start_unlike_each_other():
  model = tiny(scan_layers=True)
  tokens = jnp.ones((1, 2), jnp.int32)
  init = jax.jit(functools.partial(model.init, enable_dropout=False))
  params = init(jax.random.key(0), tokens, tokens, tokens)['params']
  layers = stacking.unstack_layers(params)['encoder']
  kernels = [layers[f'layers_{i}']['mlp']['wo']['kernel'] for i in range(2)]
  assert not np.array_equal(*kernels)


@pytest.mark.parametrize('scan_layers', [False, True])
@pytest.mark.parametrize('remat', [False, True])
def test_dropout(scan_layers, remat):
  options = {
    'scan_layers': scan_layers,
    'remat': remat,
    'num_encoder_layers': 1,
    'num_decoder_layers': 1,
  }
  model = tiny(**options, dropout_rate=0.5)
  params, data = random_params(model), random_batch(2, 5, 4)
  without = logits(model, params, data)

  @jax.jit
  def dropped(seed):
    rngs = {'dropout': jax.random.key(seed)}
    return model.apply({'params': params}, **data, rngs=rngs)

  assert not np.allclose(dropped(0), without, atol=0.1)
  assert not np.allclose(dropped(0), dropped(1), atol=0.1)
  np.testing.assert_array_equal(dropped(0), dropped(0))
  certain = tiny(**options, dropout_rate=0.0)
  np.testing.assert_array_equal(logits(certain, params, data), without)


@pytest.mark.parametrize('scan_layers', [False, True])
@pytest.mark.parametrize('float32_logits', [False, True])
def test_bfloat16_activations(scan_layers, float32_logits):
  model = tiny(scan_layers=scan_layers)
  params, data = random_params(model), random_batch(3, 8, 6)
  exact = logits(model, params, data)
  rounded = logits(
    tiny(
      scan_layers=scan_layers,
      dtype='bfloat16',
      float32_attention_logits=float32_logits,
    ),
    params,
    data,
  )
  assert rounded.dtype == np.float32
  error = np.abs(rounded - exact).max() / np.abs(exact).max()
  assert 1e-4 < error < 0.05


def test_token_ids_may_be_floats():
  model, data = tiny(), random_batch(2, 5, 4)
  params = random_params(model)
  floats = {name: tokens.astype(np.float32) for name, tokens in data.items()}
  np.testing.assert_array_equal(
    logits(model, params, floats), logits(model, params, data)
  )
  variables = jax.eval_shape(
    lambda: model.init(jax.random.key(0), **floats, enable_dropout=False)
  )
  assert shapes(variables['params']) == expected_shapes(model.config)


def test_a_token_outside_the_vocabulary_is_not_silent():
  model, data = tiny(), random_batch(1, 4, 4)
  data['encoder_input_tokens'][0, 0] = VOCAB
  assert np.isnan(logits(model, random_params(model), data)).any()


@pytest.mark.parametrize('scan_layers', [False, True])
def test_sharded_over_a_mesh_of_one_device(scan_layers):
  model = tiny(scan_layers=scan_layers)
  params, data = random_params(model), random_batch(2, 5, 4)
  expected = logits(model, params, data)
  mesh = jax.sharding.Mesh(
    np.array(jax.devices()[:1]).reshape(1, 1), ('data', 'model')
  )
  rules = [
    ('batch', 'data'),
    ('vocab', 'model'),
    ('embed', None),
    ('mlp', 'model'),
    ('heads', 'model'),
    ('kv', None),
    ('joined_kv', 'model'),
    ('relpos_buckets', None),
    ('length', None),
    ('layers', None),
  ]
  with jax.set_mesh(mesh), partitioning.axis_rules(rules):
    lowered = jax.jit(
      lambda params: model.apply(
        {'params': params}, **data, enable_dropout=False
      )
    ).lower(params)
    assert '"data"' in lowered.as_text()  # Activations follow the rules.
    assert '"model"' in lowered.as_text()
    np.testing.assert_array_equal(logits(model, params, data), expected)


def test_config_is_hashable():
  assert hash(network.T5Config(**TINY)) == hash(network.T5Config(**TINY))
