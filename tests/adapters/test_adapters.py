"""LoRA, (IA)³ and prompts in the network, and what a trainer trains of it."""

import dataclasses

import gin
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_t5

from dst_t5x.adapters import api as adapters
from dst_t5x.adapters import ia3
from dst_t5x.adapters import lora
from dst_t5x.adapters import prompts
from dst_t5x.core import parts
from dst_t5x.core import stacking
from dst_t5x.core.errors import UserError
from dst_t5x.engine import optimizers
from dst_t5x.engine import trainer as trainer_lib
from dst_t5x.method import projection
from dst_t5x.models import adapted
from dst_t5x.models import api
from dst_t5x.models.t5 import network

ALL_FOUR = '.*attention/(query|key|value|out)'
_ADAPTERS = (
  lora.LoRA(rank=3, alpha=6.0),
  lora.LoRA(rank=2, targets=ALL_FOUR),
  ia3.IA3(),
  prompts.Prompt(length=4),
)


def _network(adapter=adapters.NONE, **changes):
  config = dataclasses.replace(tiny_t5.CONFIG, **changes)
  return adapted.with_adapter(network.Transformer(config), adapter)


def _random(model, seed=0):
  """Random parameters, also of what starts at zero or one."""
  shapes = api.shapes(model)
  random = np.random.default_rng(seed)
  flat = parts.flatten(shapes)
  return parts.unflatten(
    {
      path: random.normal(0.1, 0.3, flat[path].shape).astype(np.float32)
      for path in sorted(flat)
    }
  )


def _batch(rows=3, inputs=6, targets=5, vocabulary=tiny_t5.CONFIG.vocab_size):
  random = np.random.default_rng(0)
  encoder = random.integers(2, vocabulary, (rows, inputs)).astype(np.int32)
  decoder = random.integers(2, vocabulary, (rows, targets)).astype(np.int32)
  encoder[1, 4:] = 0
  return encoder, decoder


def _logits(model, params, encoder, decoder, **more):
  batch = {
    'encoder_input_tokens': encoder,
    'decoder_input_tokens': decoder,
    'decoder_target_tokens': decoder,
    **more,
  }
  return jax.jit(model.logits)(params, batch)


@pytest.mark.parametrize('adapter', _ADAPTERS[:3])
@pytest.mark.parametrize('stack', [False, True])
def test_merged_weights_give_the_same_logits(adapter, stack):
  model = _network(adapter)
  params = _random(model)
  logits = _logits(model, params, *_batch())
  if stack:
    params = stacking.stack_layers(params)
    scanned = _network(adapter, scan_layers=True)
    np.testing.assert_allclose(
      _logits(scanned, params, *_batch()), logits, atol=1e-4
    )
  merged = parts.unflatten(adapter.merge(parts.flatten(params)))
  plain = _network(scan_layers=stack)
  assert parts.flatten(merged).keys() == parts.flatten(_random(plain)).keys()
  np.testing.assert_allclose(
    _logits(plain, merged, *_batch()), logits, atol=1e-4
  )
  flat = parts.flatten(params)
  base = parts.unflatten({path: flat[path] for path in parts.flatten(merged)})
  difference = _logits(plain, base, *_batch()) - logits
  assert np.abs(difference).max() > 0.1


@pytest.mark.parametrize('adapter', _ADAPTERS[:3])
def test_at_first_nothing_is_different(adapter):
  plain, model = _network(), _network(adapter)
  base = _random(plain)
  fresh = jax.jit(model.initialize)(jax.random.key(0))['params']
  added = {
    path: leaf
    for path, leaf in parts.flatten(fresh).items()
    if path not in parts.flatten(base)
  }
  params = parts.unflatten(parts.flatten(base) | added)
  np.testing.assert_array_equal(
    _logits(model, params, *_batch()), _logits(plain, base, *_batch())
  )


def test_a_prompt_stands_before_the_inputs():
  """The placeholders' vectors are as good as embeddings of real pieces."""
  size = tiny_t5.CONFIG.vocab_size
  adapter = prompts.Prompt(length=4)
  model = _network(adapter)
  params = _random(model)
  assert adapter.prefix(size) == (size, size + 1, size + 2, size + 3)
  encoder, decoder = _batch()
  prefix = np.tile(np.array(adapter.prefix(size), np.int32), (3, 1))
  logits = _logits(model, params, np.hstack([prefix, encoder]), decoder)
  # The same model with four more pieces, whose embeddings are the prompt.
  flat = parts.flatten(params)
  prompt = flat.pop('token_embedder/prompt')
  table = flat['token_embedder/embedding']
  flat['token_embedder/embedding'] = np.vstack([table, prompt])
  larger = _network(vocab_size=size + 4)
  kernel = flat['decoder/logits_dense/kernel']
  flat['decoder/logits_dense/kernel'] = np.pad(kernel, ((0, 0), (0, 4)))
  expected = _logits(
    larger, parts.unflatten(flat), np.hstack([prefix, encoder]), decoder
  )
  np.testing.assert_allclose(logits, expected[..., :size], atol=1e-5)
  assert np.isnan(_logits(model, params, prefix + 4, decoder)).any()


def test_packed_prompts_are_those_of_single_examples():
  size = tiny_t5.CONFIG.vocab_size
  adapter = prompts.Prompt(length=3)
  model = _network(adapter)
  params = _random(model)
  encoder, decoder = _batch(rows=2)
  encoder[1, 4:] = 9
  prefix = np.tile(np.array(adapter.prefix(size), np.int32), (2, 1))
  encoder = np.hstack([prefix, encoder])
  alone = _logits(model, params, encoder, decoder)
  segments = [
    np.repeat([[1, 2]], x.shape[1], axis=1).astype(np.int32)
    for x in (encoder, decoder)
  ]
  packed = _logits(
    model,
    params,
    encoder.reshape(1, -1),
    decoder.reshape(1, -1),
    encoder_segment_ids=segments[0],
    decoder_segment_ids=segments[1],
  )
  np.testing.assert_allclose(packed.reshape(alone.shape), alone, atol=1e-4)


def test_first_prompts():
  random = np.random.default_rng(0)
  table = random.normal(size=(50, 8)).astype(np.float32)
  seed = {'token_embedder/embedding': table}

  def first(**options):
    adapter = prompts.Prompt(length=4, **options)
    encode = {'yes': [7], 'not so': [8, 9], 'a': [1], 'b': [2], 'c': [3]}
    (prompt,) = adapter.initialize(
      {'token_embedder/prompt': np.zeros((4, 8), np.float32)},
      seed,
      np.random.default_rng(1),
      encode.__getitem__,
    ).values()
    assert prompt.shape == (4, 8)
    assert prompt.dtype == np.float32
    return prompt

  rows = {row.tobytes() for row in table[3:]}
  assert all(row.tobytes() in rows for row in first())
  labels = first(initialization='labels', labels=['yes', 'not so'])
  np.testing.assert_array_equal(labels[0], table[7])
  np.testing.assert_allclose(labels[1], (table[8] + table[9]) / 2)
  assert all(row.tobytes() in rows for row in labels[2:])
  many = first(initialization='labels', labels=['a', 'b', 'c', 'a', 'b'])
  np.testing.assert_array_equal(many, table[[1, 2, 3, 1]])
  assert np.abs(first(initialization='uniform')).max() <= 0.5
  np.testing.assert_array_equal(first(), first())


def test_dropout_is_of_the_low_rank_path_only():
  model = _network(lora.LoRA(dropout_rate=0.5), dropout_rate=0.0)
  params = _random(model)
  encoder, decoder = _batch()
  batch = {
    'encoder_input_tokens': encoder,
    'decoder_input_tokens': decoder,
    'decoder_target_tokens': decoder,
  }
  apply = jax.jit(model.logits)

  def logits(key):
    return apply(params, batch, jax.random.key(key))

  np.testing.assert_array_equal(logits(0), logits(0))
  assert np.abs(logits(0) - logits(1)).max() > 1e-3
  flat = parts.flatten(params)
  zero = {p: np.zeros_like(x) for p, x in flat.items() if p.endswith('lora_b')}
  params = parts.unflatten(flat | zero)
  np.testing.assert_array_equal(logits(0), logits(1))


def _trainer(model, **options):
  return trainer_lib.Trainer(
    network=model,
    optimizer=optimizers.adafactor(optimizers.schedule(0.1)),
    projection=projection.NoProjection(),
    **options,
  )


@pytest.mark.parametrize(
  ('adapter', 'trained', 'sizes'),
  [
    (_ADAPTERS[0], None, {'lora_a', 'lora_b'}),
    (_ADAPTERS[2], None, {'ia3'}),
    (_ADAPTERS[3], None, {'prompt'}),
    (adapters.NONE, ['.*norm/scale'], {'scale'}),
    (adapters.NONE, ['decoder/logits_dense/kernel'], {'kernel'}),
  ],
)
def test_only_its_own_parameters_are_trained(adapter, trained, sizes):
  model = _network(adapter)
  trainer = _trainer(model, trained=trained)
  params = _random(model)
  mine, frozen = trainer.split(params)
  assert {path.split('/')[-1] for path in parts.flatten(mine)} == sizes
  assert parts.flatten(parts.join(mine, frozen)).keys() == (
    parts.flatten(params).keys()
  )
  state = trainer.init(mine)
  encoder, decoder = _batch()
  batch = {
    'encoder_input_tokens': encoder,
    'decoder_input_tokens': decoder,
    'decoder_target_tokens': decoder,
    'decoder_loss_weights': np.ones_like(decoder),
  }
  if adapter.added == prompts.Prompt.added:
    prefix = np.tile(
      np.array(adapter.prefix(model.vocab_size), np.int32), (3, 1)
    )
    batch['encoder_input_tokens'] = np.hstack([prefix, encoder])
  # The optimizer has no state for what is frozen.
  held = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state))
  assert held <= 1.5 * sum(leaf.size for leaf in jax.tree.leaves(mine)) + 10
  step = jax.jit(trainer.train_step)
  after, metrics = step(
    state,
    trainer_lib.Constants((), frozen),
    batch,
    jax.random.key(0),
    jnp.asarray(True),
  )
  assert np.isfinite(metrics['loss'])
  assert metrics['gradient_norm'] > 0
  for path, leaf in parts.flatten(after.params).items():
    assert (leaf != parts.flatten(mine)[path]).any(), path


def test_gradients_of_what_is_frozen_are_not_computed():
  def operations(model, trained=None):
    trainer = _trainer(model, trained=trained)
    encoder, decoder = _batch(rows=16)
    batch = {
      'encoder_input_tokens': encoder,
      'decoder_input_tokens': decoder,
      'decoder_target_tokens': decoder,
      'decoder_loss_weights': np.ones_like(decoder),
    }
    lowered = jax.jit(trainer._gradients).lower(
      *trainer.split(_random(model)), batch, jax.random.key(0)
    )
    return lowered.compile().cost_analysis()['flops']

  full = operations(_network())
  # A third of a step's products are those of the weights' gradients.
  assert operations(_network(lora.LoRA(rank=1))) < 0.8 * full
  assert operations(_network(), ['decoder/logits_dense/kernel']) < 0.6 * full


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda: lora.LoRA(rank=0), 'LORA_RANK must be a positive'),
    (lambda: lora.LoRA(alpha=0.0), 'LORA_ALPHA must be above 0'),
    (lambda: lora.LoRA(dropout_rate=1.0), 'LORA_DROPOUT_RATE must be in'),
    (lambda: lora.LoRA(targets='(query'), 'LORA_TARGETS is no regular'),
    (lambda: prompts.Prompt(length=0), 'PROMPT_LENGTH must be a positive'),
    (
      lambda: prompts.Prompt(initialization='vocab'),
      "it is 'vocab'; did you mean 'vocabulary'?",
    ),
    (lambda: prompts.Prompt(initialization='labels'), 'PROMPT_LABELS goes'),
    (lambda: prompts.Prompt(labels=['a']), 'PROMPT_LABELS goes'),
    (lambda: prompts.Prompt(labels='a'), 'PROMPT_LABELS must be a list'),
    (lambda: _trainer(_network(), trained='.*'), 'TRAINED is a list'),
    (
      lambda: dataclasses.replace(
        _trainer(_network(lora.LoRA())),
        projection=projection.SubsetProjection(0.1),
      ),
      'LoRA adds parameters that no seed has',
    ),
    (
      lambda: _trainer(_network(ia3.IA3()), trained=['.*norm/scale']),
      'IA3 trains what it adds and nothing else',
    ),
    (
      lambda: parts.split({'a': {'kernel': 1}}, ['a/kernal']),
      "no parameter matches 'a/kernal'; did you mean 'a/kernel'",
    ),
    (lambda: parts.split({'a': 1}, ['(']), 'no regular expression'),
    (
      lambda: adapters.Adapter.from_json({'kind': 'Lora'}),
      "an adapter of kind 'Lora' is not known",
    ),
    (lambda: prompts.Prompt().merge({}), 'a prompt cannot be merged'),
  ],
)
def test_mistakes(make, message):
  with pytest.raises(UserError) as caught:
    make()
  assert message in str(caught.value)
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize('adapter', [*_ADAPTERS, adapters.NONE])
def test_json_gives_the_adapter_back(adapter):
  assert adapters.Adapter.from_json(adapter.to_json()) == adapter


def test_a_wrapper_of_gin_is_no_adapter_of_its_own():
  class Own(adapters.Adapter):
    pass

  wrapper = gin.external_configurable(Own, 'Own', module='test_adapters')
  assert issubclass(wrapper, Own)
  assert wrapper is not Own
  assert adapters.Adapter.kinds.pop('Own') is Own
