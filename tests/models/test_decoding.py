"""Greedy and beam search, compared with transformers, NumPy and full rows."""

import functools

import jax
import jax.numpy as jnp
from networks import VOCAB
from networks import logits
from networks import random_batch
from networks import random_params
from networks import tiny
import numpy as np
import pytest

from dst_t5x.checkpoints import hf_checkpoint
from dst_t5x.core import stacking
from dst_t5x.models import decoding

LENGTH = 12
EOS = 1
DECODERS = {
  'greedy': decoding.GreedyDecoder(),
  'beam': decoding.BeamSearch(num_beams=4, alpha=0.6),
  'plain beam': decoding.BeamSearch(num_beams=4, alpha=0.0),
}


def small(**changes):
  return tiny(num_decoder_layers=2, **changes)


def ending_params(model):
  """Returns random parameters that give sequences of several lengths."""
  params = random_params(model, seed=5)
  params['decoder']['logits_dense']['kernel'][:, EOS] *= 3
  return params


@functools.cache
def compiled(decoder, model, length, eos_id):
  return jax.jit(lambda p, t: decoder(model, p, t, length, eos_id))


def decode(decoder, model, params, tokens, length=LENGTH, eos_id=EOS):
  found, scores = compiled(decoder, model, length, eos_id)(params, tokens)
  assert found.dtype == jnp.int32
  assert scores.dtype == jnp.float32
  return np.asarray(found), np.asarray(scores)


def lengths(tokens):
  """Returns the number of tokens with the end token; all if there is none."""
  ends = tokens == EOS
  return np.where(ends.any(1), ends.argmax(1) + 1, tokens.shape[1])


def brute_force_beam(following, num_beams, alpha):
  """Beam search by the formula: lists and sorts every continuation."""
  live, finished = [(0.0, ())], []
  for length in range(1, LENGTH + 1):
    candidates = [
      (score + gain, (*prefix, token))
      for score, prefix in live
      for token, gain in enumerate(following(prefix).tolist())
    ]
    best = sorted(candidates, reverse=True)[: 2 * num_beams]
    penalty = ((5 + length) / 6) ** alpha
    finished += [(s / penalty, p) for s, p in best if p[-1] == EOS]
    finished = sorted(finished, reverse=True)[:num_beams]
    live = [(s, p) for s, p in best if p[-1] != EOS][:num_beams]
    bound = live[0][0] / ((5 + LENGTH) / 6) ** alpha
    if len(finished) == num_beams and finished[-1][0] > bound:
      break
  score, tokens = max(finished) if finished else max(live)
  return np.pad(tokens, (0, LENGTH - len(tokens))), score


def brute_force_greedy(following):
  prefix, score = (), 0.0
  while len(prefix) < LENGTH and EOS not in prefix:
    scores = following(prefix)
    prefix, score = (*prefix, int(scores.argmax())), score + scores.max()
  return np.pad(prefix, (0, LENGTH - len(prefix))), score


@pytest.fixture(scope='module')
def setup():
  """A network, its parameters, and inputs with outputs of several lengths."""
  model = small()
  tokens = random_batch(6, 9, 1, seed=1)['encoder_input_tokens']
  return model, ending_params(model), tokens


@pytest.fixture(scope='module')
def following(setup):
  """A function from row and prefix to the next token's log-probabilities.

  It runs the network over the whole prefix, without a cache.
  """
  model, params, encoder_tokens = setup

  @jax.jit
  def run(tokens, inputs, index):
    outputs = model.apply(
      {'params': params},
      tokens,
      inputs,
      jnp.ones_like(inputs),
      enable_dropout=False,
    )
    return jax.nn.log_softmax(outputs[0, index])

  @functools.cache
  def of_row(row, prefix):
    inputs = np.zeros((1, LENGTH), np.int32)
    inputs[0, 1 : len(prefix) + 1] = prefix
    return np.asarray(run(encoder_tokens[row][None], inputs, len(prefix)))

  return of_row


def test_the_network_ends_sequences_at_differing_lengths(setup):
  tokens, _ = decode(DECODERS['greedy'], *setup)
  assert len(set(lengths(tokens).tolist())) >= 3
  assert (tokens == EOS).any(1).sum() >= 3


def test_greedy_equals_full_sequences(setup, following):
  found, scores = decode(DECODERS['greedy'], *setup)
  for row in range(len(found)):
    tokens, score = brute_force_greedy(functools.partial(following, row))
    np.testing.assert_array_equal(found[row], tokens)
    np.testing.assert_allclose(scores[row], score, atol=1e-4)


@pytest.mark.parametrize('num_beams', [1, 4])
@pytest.mark.parametrize('alpha', [0.0, 0.6, 2.0])
def test_beam_search_equals_brute_force(setup, following, num_beams, alpha):
  found, scores = decode(decoding.BeamSearch(num_beams, alpha), *setup)
  for row in range(len(found)):
    tokens, score = brute_force_beam(
      functools.partial(following, row), num_beams, alpha
    )
    np.testing.assert_array_equal(found[row], tokens)
    np.testing.assert_allclose(scores[row], score, atol=1e-4)


def test_the_penalty_prefers_longer_sequences(setup):
  found = {
    alpha: lengths(decode(decoding.BeamSearch(4, alpha), *setup)[0]).sum()
    for alpha in (0.0, 2.0)
  }
  assert found[0.0] < found[2.0]


@pytest.mark.parametrize('num_beams', [1, 4])
def test_outputs_equal_hugging_face(setup, tmp_path, num_beams):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  model, params, tokens = setup
  hf_checkpoint.save(tmp_path / 'peer', params, model)
  peer = transformers.T5ForConditionalGeneration.from_pretrained(
    tmp_path / 'peer'
  )
  peer.eval()
  length = 40
  theirs = peer.generate(
    input_ids=torch.from_numpy(tokens).long(),
    attention_mask=torch.from_numpy(tokens > 0).long(),
    decoder_start_token_id=0,
    eos_token_id=EOS,
    pad_token_id=0,
    max_new_tokens=length,
    num_beams=num_beams,
    length_penalty=0.0,
    do_sample=False,
  ).numpy()[:, 1:]
  theirs = np.pad(theirs, ((0, 0), (0, length - theirs.shape[1])))
  # Where padding is 0, beam search there fills up with the end token.
  after = np.arange(length) >= lengths(theirs)[:, None]
  theirs = np.where(after, 0, theirs)
  decoder = (
    decoding.BeamSearch(num_beams, alpha=0.0)
    if num_beams > 1
    else decoding.GreedyDecoder()
  )
  ours, _ = decode(decoder, model, params, tokens, length)
  # A sequence that the maximal length cuts counts as finished there, but not
  # in T5X: only those that end can be compared.
  ended = (theirs == EOS).any(1)
  assert ended.sum() >= 3
  np.testing.assert_array_equal(ours[ended], theirs[ended])


@pytest.mark.parametrize('name', DECODERS)
def test_scanned_layers_decode_alike(setup, name):
  _, params, tokens = setup
  found, scores = decode(DECODERS[name], *setup)
  scanned = small(scan_layers=True)
  stacked = stacking.stack_layers(params)
  again, other_scores = decode(DECODERS[name], scanned, stacked, tokens)
  np.testing.assert_array_equal(again, found)
  np.testing.assert_allclose(other_scores, scores, atol=1e-4)


@pytest.mark.parametrize('name', DECODERS)
def test_what_follows_the_end_is_padding(setup, name):
  found, _ = decode(DECODERS[name], *setup)
  for row, length in zip(found, lengths(found), strict=True):
    assert (row[length:] == 0).all()


@pytest.mark.parametrize('name', DECODERS)
def test_an_empty_example_stays_empty_and_disturbs_no_other(setup, name):
  model, params, tokens = setup
  found, scores = decode(DECODERS[name], *setup)
  padded = np.concatenate([tokens, np.zeros_like(tokens[:2])])
  again, more_scores = decode(DECODERS[name], model, params, padded)
  np.testing.assert_array_equal(again[:-2], found)
  np.testing.assert_allclose(more_scores[:-2], scores, atol=1e-5)
  assert (again[-2:] == 0).all()
  assert (more_scores[-2:] == 0).all()


def test_another_end_token(setup):
  model, params, tokens = setup
  greedy = DECODERS['greedy']
  endless, _ = decode(greedy, model, params, tokens, eos_id=VOCAB + 1)
  end = int(endless[0, 3])
  found, _ = decode(greedy, model, params, tokens, eos_id=end)
  for row, whole in zip(found, endless, strict=True):
    ends = np.flatnonzero(whole == end)
    length = ends[0] + 1 if ends.size else LENGTH
    np.testing.assert_array_equal(row[:length], whole[:length])
    assert (row[length:] == 0).all()


def test_decoding_ends_with_the_last_sequence(setup, monkeypatch):
  """Counts the decoding steps that run."""
  model, params, tokens = setup
  found, _ = decode(DECODERS['greedy'], *setup)
  ended = (found == EOS).any(1)
  steps = []
  start = type(model).start_decoding

  def counting(*args):
    begun = start(*args)

    def counted(tokens, cache):
      jax.debug.callback(lambda: steps.append(1))
      return begun.step(tokens, cache)

    return begun._replace(step=counted)

  monkeypatch.setattr(type(model), 'start_decoding', counting)
  decoder = jax.jit(lambda t: DECODERS['greedy'](model, params, t, 50))
  again, _ = decoder(tokens[ended])
  jax.effects_barrier()
  assert len(steps) == lengths(found[ended]).max()
  np.testing.assert_array_equal(again[:, :LENGTH], found[ended])


def cached_logits(model, params, batch, remember):
  """Returns the logits of every position, one decoding step at a time."""
  length = batch['decoder_input_tokens'].shape[1]
  encoder_tokens = batch['encoder_input_tokens']
  variables = {'params': params}
  encoded = jax.jit(
    lambda: model.apply(
      variables, encoder_tokens, enable_dropout=False, method='encode'
    )
  )()
  apply = functools.partial(model.apply, enable_dropout=False, decode=True)
  if remember:
    create = functools.partial(
      apply, mutable=['cache', 'memory'], method='decode'
    )
    inputs = batch['decoder_input_tokens']
    _, created = jax.jit(create)(
      variables, encoded, encoder_tokens, inputs, inputs
    )
  else:  # As T5X does: from inputs that are nothing but ones.
    ones = {name: np.ones_like(tokens) for name, tokens in batch.items()}
    create = functools.partial(apply, mutable=['cache'])
    _, created = jax.jit(create)(variables, **ones)
    assert set(created) == {'cache'}

  @jax.jit
  def step(cache, tokens):
    outputs, updated = apply(
      {**variables, **created, 'cache': cache},
      encoded,
      encoder_tokens,
      tokens,
      tokens,
      max_decode_length=length,
      mutable=['cache'],
      method='decode',
    )
    return outputs[:, 0], updated['cache']

  cache, outputs = created['cache'], []
  for i in range(length):
    logits, cache = step(cache, batch['decoder_input_tokens'][:, i : i + 1])
    outputs.append(logits)
  return np.stack(outputs, axis=1)


@pytest.mark.parametrize('remember', [True, False])
@pytest.mark.parametrize('scan_layers', [True, False])
def test_cached_logits_equal_those_of_the_sequence(remember, scan_layers):
  model = tiny(scan_layers=scan_layers)
  params, batch = random_params(model), random_batch(3, 7, 20)
  expected = logits(model, params, batch)
  found = cached_logits(model, params, batch, remember)
  real = batch['decoder_target_tokens'] > 0
  np.testing.assert_allclose(found[real], expected[real], atol=1e-4)


def test_the_cache_is_one_that_t5x_can_drive():
  """All leaves but `cache_index` begin with the axes batch, or layer, batch."""
  ones = {
    name: np.ones_like(tokens) for name, tokens in random_batch(5, 7, 4).items()
  }
  for scan_layers in (False, True):
    model = tiny(scan_layers=scan_layers)
    assert model.scan_layers == scan_layers
    _, created = jax.eval_shape(
      lambda params, model=model: model.apply(
        {'params': params},
        **ones,
        enable_dropout=False,
        decode=True,
        mutable=['cache'],
      ),
      random_params(model),
    )
    leaves, _ = jax.tree_util.tree_flatten_with_path(created['cache'])
    assert len(leaves) == (3 if scan_layers else 7)
    for path, leaf in leaves:
      if path[-1].key == 'cache_index':
        assert leaf.shape == ()
      else:
        assert leaf.shape[1 if scan_layers else 0] == 5


def test_a_step_without_length_is_refused():
  model, batch = tiny(), random_batch(1, 3, 2)
  params = random_params(model)
  step = jax.jit(
    functools.partial(
      model.apply, enable_dropout=False, decode=True, mutable=['cache']
    )
  )
  _, created = step({'params': params}, **batch)
  with pytest.raises(ValueError, match='max_decode_length'):
    step({'params': params, **created}, **batch)


def test_packed_batches_are_not_decoded():
  model, batch = tiny(), random_batch(1, 3, 2)
  batch['encoder_segment_ids'] = np.ones((1, 3), np.int32)
  batch['decoder_segment_ids'] = np.ones((1, 2), np.int32)
  with pytest.raises(ValueError, match='Packed'):
    model.apply(
      {'params': random_params(model)},
      **batch,
      enable_dropout=False,
      decode=True,
      mutable=['cache'],
    )
