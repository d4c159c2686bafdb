"""Sampling: filters as in transformers, seeds, independence of batches."""

from decoder_only import VOCAB
from decoder_only import pair
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dst_t5x.core.errors import UserError
from dst_t5x.models import decoding
from dst_t5x.models import sampling

LENGTH = 12


def _draws(rows, temperature=1.0, top_k=None, top_p=1.0, random_seed=0):
  decoder = decoding.Sampling(temperature, top_k, top_p, random_seed)
  return decoder.draws(jnp.arange(rows))


@pytest.mark.parametrize('top_k', [None, 1, 5, 1000])
@pytest.mark.parametrize('top_p', [1e-6, 0.3, 0.9, 1.0])
@pytest.mark.parametrize('temperature', [0.2, 1.0, 3.0])
def test_filters_are_those_of_transformers(temperature, top_k, top_p):
  torch = pytest.importorskip('torch')
  processors = pytest.importorskip('transformers.generation.logits_process')
  rows, vocab = 6, 50
  logits = np.random.default_rng(0).normal(0, 3, (rows, vocab))
  logits = logits.astype(np.float32)
  chain = [processors.TemperatureLogitsWarper(temperature)]
  if top_k is not None:
    chain.append(processors.TopKLogitsWarper(min(top_k, vocab)))
  if top_p < 1:
    chain.append(processors.TopPLogitsWarper(top_p))
  theirs = torch.from_numpy(logits)
  for process in chain:
    theirs = process(None, theirs)
  draws = _draws(rows, temperature, top_k, top_p)
  kept = jax.jit(sampling.kept)(
    logits / np.float32(temperature), draws.top_k, draws.top_p
  )
  np.testing.assert_array_equal(kept, np.isfinite(theirs.numpy()))


def test_tokens_are_as_frequent_as_they_are_probable():
  rows = 20_000
  logits = np.log(np.float32([0.4, 0.3, 0.2, 0.1]))
  draws = _draws(rows, temperature=0.5, top_k=3)

  @jax.jit
  def draw(draws):
    tiled = jnp.tile(logits, (rows, 1))
    return sampling.draw(tiled, draws, sampling.keys(draws), jnp.int32(3))

  counts = np.bincount(draw(draws), minlength=4) / rows
  wanted = np.array([0.4, 0.3, 0.2, 0.0]) ** 2
  np.testing.assert_allclose(counts, wanted / wanted.sum(), atol=0.015)


@pytest.mark.parametrize('temperature', [1e-6, 1e-30])
def test_a_temperature_near_zero_is_greedy(temperature):
  logits = np.random.default_rng(0).normal(0, 3, (5, 9)).astype(np.float32)
  draws = _draws(5, temperature)
  found = sampling.draw(logits, draws, sampling.keys(draws), jnp.int32(0))
  np.testing.assert_array_equal(found, logits.argmax(-1))


def _prompts(model, rows, length):
  """Returns prompts of lengths 1 to 9, and 0; windows are 5 tokens."""
  prompts = np.full((len(rows), length), model.pad_id, np.int32)
  for row, number in enumerate(rows):
    random = np.random.default_rng(number)
    size = (3 * number) % 10
    prompts[row, :size] = random.integers(0, VOCAB, size)
  return prompts


def _decode(decoder, rows, length):
  """Returns the tokens of examples of these numbers."""
  model, params, _ = pair('gemma3')
  decode = jax.jit(
    lambda params, prompts, numbers: decoder(
      model, params, prompts, LENGTH, numbers=numbers
    )
  )
  prompts = _prompts(model, rows, length)
  tokens, scores = decode(params, prompts, np.array(rows, np.int32))
  return decoding.continuations(model, np.asarray(tokens)), np.asarray(scores)


def test_an_example_is_the_same_in_every_batch():
  """Whatever its row, its neighbours, and how prompts are filled up."""
  decoder = decoding.Sampling(temperature=1.2, top_p=0.95, random_seed=5)
  rows = [0, 1, 2, 3, 4, 5]
  found, scores = _decode(decoder, rows, 9)
  again, again_scores = _decode(decoder, rows[::-1], 16)
  for one, other in zip(found, again[::-1], strict=True):
    np.testing.assert_array_equal(one, other)
  np.testing.assert_allclose(scores, again_scores[::-1], atol=1e-4)
  alone, _ = _decode(decoder, [3], 9)
  np.testing.assert_array_equal(alone[0], found[3])
  assert not len(found[0])  # An empty prompt is not continued.
  assert len({tuple(tokens) for tokens in found}) == len(rows)


def test_seeds_and_numbers_make_a_difference():
  model, params, _ = pair('llama3')
  prompts = np.tile(_prompts(model, [3], 9), (4, 1))

  def decode(seed):
    decoder = decoding.Sampling(random_seed=seed)
    return decoder(model, params, prompts, 6, eos_id=VOCAB)[0]

  one, other = decode(0), decode(1)
  np.testing.assert_array_equal(one, decode(0))
  tokens = [tuple(row.tolist()) for row in np.concatenate([one, other])]
  assert len(set(tokens)) == 8


def test_every_example_may_have_its_own_settings():
  """As each would be drawn with a decoder of these settings."""
  model, params, _ = pair('qwen2')
  prompts = _prompts(model, [3, 3, 2], 9)
  decoders = [
    decoding.Sampling(0.7, top_k=5, random_seed=3),
    decoding.Sampling(1.5, top_p=0.6, random_seed=4),
    decoding.Sampling(2.0, random_seed=3),
  ]
  each = [d.draws(np.int32([i])) for i, d in enumerate(decoders)]
  draws = jax.tree.map(lambda *x: jnp.concatenate(x), *each)
  found, scores = decoding.Sampling()(model, params, prompts, 8, draws=draws)
  for i, decoder in enumerate(decoders):
    numbers = np.int32([i])
    tokens, score = decoder(
      model, params, prompts[i : i + 1], 8, numbers=numbers
    )
    np.testing.assert_array_equal(found[i], tokens[0])
    np.testing.assert_allclose(scores[i], score[0], atol=1e-4)


def test_scores_are_the_networks_own_log_probabilities():
  model, params, _ = pair('llama3')
  prompts = _prompts(model, [3, 2], 9)
  decoder = decoding.Sampling(temperature=2.0, top_k=30)
  tokens, scores = decoder(model, params, prompts, 4, eos_id=VOCAB)
  for prompt, continuation, score in zip(prompts, tokens, scores, strict=True):
    prompt = prompt[prompt != model.pad_id]
    row = np.concatenate([prompt, continuation])[None]
    logits = model.logits(params, {'decoder_input_tokens': row[:, :-1]})[0]
    log_probabilities = jax.nn.log_softmax(logits)[len(prompt) - 1 :]
    expected = log_probabilities[np.arange(4), continuation].sum()
    np.testing.assert_allclose(score, expected, atol=1e-4)


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'temperature': 0.0}, 'must be above 0, it is 0.0: .*GreedyDecoder()'),
    ({'temperature': 1e-50}, 'temperature must be above 0'),
    ({'temperature': -1.0}, 'TEMPERATURE must be'),
    ({'top_k': 0}, 'TOP_K must be'),
    ({'top_p': 0.0}, 'TOP_P must be'),
    ({'top_p': 1.5}, 'TOP_P must be'),
    ({'random_seed': -1}, 'RANDOM_SEED must be'),
  ],
)
def test_what_makes_no_sense_is_refused(settings, message):
  with pytest.raises(UserError, match=message) as caught:
    decoding.Sampling(**settings)
  assert '\n' not in str(caught.value)
