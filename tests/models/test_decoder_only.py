"""Decoder-only networks, compared with transformers on the same weights."""

import decoder_only
from decoder_only import FAMILIES
from decoder_only import VOCAB
from decoder_only import pair
from decoder_only import random_params
from decoder_only import tiny
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dst_t5x.core import parts
from dst_t5x.core import stacking
from dst_t5x.core.errors import UserError
from dst_t5x.models import api
from dst_t5x.models import decoding
from dst_t5x.models.decoder_only import network

torch = pytest.importorskip('torch')
pytest.importorskip('transformers')

# More than the windows of all tiny networks.
LENGTH = 14


def random_tokens(*shape, seed=0):
  """Returns int32 tokens; 0, padding in T5, is one of them."""
  tokens = np.random.default_rng(seed).integers(0, VOCAB, shape, np.int32)
  tokens[..., 1::5] = 0
  return tokens


def logits(model, params, **batch):
  batch = {f'decoder_{name}': value for name, value in batch.items()}
  return np.asarray(jax.jit(model.logits)(params, batch))


def their_logits(other, tokens, **inputs):
  with torch.no_grad():
    return other(torch.from_numpy(tokens).long(), **inputs).logits.numpy()


@pytest.mark.parametrize('shape', [(1, 1), (3, LENGTH)])
@pytest.mark.parametrize('family', FAMILIES)
def test_logits_equal_hugging_face(family, shape):
  model, params, other = pair(family)
  tokens = random_tokens(*shape)
  lengths = np.maximum(shape[1] - 4 * np.arange(shape[0]), 1)[:, None]
  is_token = np.arange(shape[1]) < lengths
  tokens = np.where(is_token, tokens, 0)
  theirs = their_logits(
    other, tokens, attention_mask=torch.from_numpy(is_token).long()
  )
  ours = logits(model, params, input_tokens=tokens)
  assert np.abs(theirs).max() > 0.5
  np.testing.assert_allclose(ours[is_token], theirs[is_token], atol=1e-4)


@pytest.mark.parametrize('family', FAMILIES)
def test_examples_of_a_packed_row_do_not_see_each_other(family):
  model, params, other = pair(family)
  examples = [random_tokens(1, n, seed=n) for n in (7, 3, 2)]
  tokens = np.concatenate([*examples, np.zeros((1, 2), np.int32)], 1)
  sizes = [7, 3, 2, 2]
  packed = logits(
    model,
    params,
    input_tokens=tokens,
    segment_ids=np.repeat([[1, 2, 3, 0]], sizes, 1),
    positions=np.concatenate([np.arange(n) for n in sizes])[None],
  )
  alone = [their_logits(other, example)[0] for example in examples]
  np.testing.assert_allclose(packed[0, :12], np.concatenate(alone), atol=1e-4)


@pytest.mark.parametrize('family', FAMILIES)
def test_gradients_equal_torch(family):
  model, params, other = pair(family)
  # Torch gives an embedding that it takes for padding no gradient.
  tokens = random_tokens(2, 9) % (VOCAB - 2) + 2
  other(torch.from_numpy(tokens).long()).logits.square().mean().backward()
  theirs = {
    name: parameter.grad.numpy() for name, parameter in other.named_parameters()
  }
  other.zero_grad()

  def loss(params):
    return jnp.square(
      model.logits(params, {'decoder_input_tokens': tokens})
    ).mean()

  ours = parts.flatten(jax.jit(jax.grad(loss))(params))
  for name, tensor in decoder_only.hf_names.layout(model.config).items():
    gradient = theirs[name].T if tensor.transposed else theirs[name]
    error = np.linalg.norm(ours[tensor.path] - gradient)
    assert error < 1e-3 * np.linalg.norm(gradient), name


PADDED = {
  'at the end': lambda prompt, n: [*prompt, *[-1] * n],
  'before': lambda prompt, n: [*[-1] * n, *prompt],
  'between': lambda prompt, n: [*prompt[:1], *[-1] * n, *prompt[1:]],
}


@pytest.mark.parametrize('scan_layers', [False, True])
def test_logits_of_decoding_are_those_of_the_whole(scan_layers):
  """For any split of a row into prompt and steps, and any padding."""
  model = tiny('gemma3', scan_layers=scan_layers)
  params = random_params(tiny('gemma3'))
  params = stacking.stack_layers(params) if scan_layers else params
  row = random_tokens(LENGTH)
  whole = logits(model, params, input_tokens=row[None])[0]
  cases = [(pad, n) for pad in PADDED.values() for n in (1, 6, LENGTH)]
  prompts = np.array([pad(row[:n], LENGTH - n) for pad, n in cases], np.int32)
  beams = 2
  sizes = np.repeat([n for _, n in cases], beams)

  @jax.jit
  def decode(params, prompts, following):
    start = model.start_decoding(params, prompts, beams, LENGTH)

    def step(state, later):
      found, cache = start.step(*state)
      return (later, cache), found

    return jax.lax.scan(step, (start.first, start.cache), following)[1]

  steps = 9
  places = np.minimum(sizes + np.arange(steps)[:, None], LENGTH - 1)
  found = np.asarray(decode(params, prompts, row[places])).swapaxes(0, 1)
  for i, size in enumerate(sizes):
    expected = whole[size - 1 :][:steps]
    np.testing.assert_allclose(found[i, : len(expected)], expected, atol=2e-5)


@pytest.mark.parametrize('family', ['gemma3', 'qwen2'])
def test_rows_in_slots_begin_at_different_steps(family):
  model = tiny(family)
  params = random_params(model)
  rows = [random_tokens(LENGTH, seed=n) for n in range(3)]
  begins = {2: (0, 5), 0: (3, 1), 1: (4, 9)}  # Slot -> step, prompt's length.
  slots = model.slots(params, LENGTH)
  fill, step = jax.jit(slots.fill), jax.jit(slots.step)
  # What an earlier row or padding has left has no effect.
  cache = jax.tree.map(lambda x: x + 1e3, slots.blank(3))
  places, found = {}, {slot: [] for slot in begins}
  for number in range(10):
    for slot, (when, size) in begins.items():
      if when == number:
        prompt = np.full((1, 10), model.pad_id, np.int32)
        prompt[0, :size] = rows[slot][:size]
        cache = fill(cache, jnp.array([slot]), prompt)
        places[slot] = size - 1
    here = np.array([places.get(slot, 0) for slot in range(3)], np.int32)
    here = np.minimum(here, LENGTH - 1)
    tokens = np.array([rows[slot][here[slot]] for slot in range(3)])
    logits_, cache = step(cache, tokens, here)
    for slot in places:
      if places[slot] < LENGTH:
        found[slot].append(np.asarray(logits_[slot]))
      places[slot] += 1
  whole = logits(model, params, input_tokens=np.stack(rows))
  for slot, (_, size) in begins.items():
    expected = whole[slot, size - 1 :][: len(found[slot])]
    np.testing.assert_allclose(found[slot], expected, atol=2e-5)


@pytest.mark.parametrize('family', ['gemma2', 'gemma3', 'llama3'])
def test_greedy_decoding_equals_transformers_generate(family):
  model, params, other = pair(family)
  length, steps, eos = 9, 32, 7
  rows = [random_tokens(n, seed=n) for n in (9, 1, 4)]
  prompts = np.full((4, length), model.pad_id, np.int32)  # One has no token.
  for prompt, row in zip(prompts, rows, strict=False):
    prompt[: len(row)] = row
  decoder = decoding.GreedyDecoder()
  tokens, _ = jax.jit(lambda p, x: decoder(model, p, x, steps, eos))(
    params, prompts
  )
  *found, nothing = decoding.continuations(model, np.asarray(tokens))
  assert not len(nothing)
  for row, ours in zip(rows, found, strict=True):
    theirs = other.generate(
      torch.from_numpy(row)[None].long(),
      attention_mask=torch.ones(1, len(row), dtype=torch.long),
      max_new_tokens=steps,
      do_sample=False,
      eos_token_id=eos,
      pad_token_id=0,
    )[0, len(row) :].numpy()
    np.testing.assert_array_equal(ours, theirs)


def test_beam_search_with_one_beam_is_greedy():
  model, params, _ = pair('smollm2')
  prompts = random_tokens(2, 6)
  found = [
    jax.jit(lambda p, x, decoder=decoder: decoder(model, p, x, 8))(
      params, prompts
    )[0]
    for decoder in (decoding.GreedyDecoder(), decoding.BeamSearch(num_beams=1))
  ]
  np.testing.assert_array_equal(*found)


def _loss_gradient(model, params, **batch):
  batch = {f'decoder_{name}': value for name, value in batch.items()}

  def loss(params):
    return jnp.square(model.logits(params, batch)).mean()

  return jax.jit(jax.value_and_grad(loss))(params)


@pytest.mark.parametrize(
  'changes',
  [
    {'scan_layers': True},
    {'remat': True},
    {'scan_layers': True, 'remat': True},
  ],
)
def test_scanning_and_rematerialising_change_nothing(changes):
  plain, variant = tiny('gemma3'), tiny('gemma3', **changes)
  params, tokens = random_params(plain), random_tokens(2, LENGTH)
  loss, gradient = _loss_gradient(plain, params, input_tokens=tokens)
  if variant.scan_layers:
    params = stacking.stack_layers(params)
  other_loss, other = _loss_gradient(variant, params, input_tokens=tokens)
  if variant.scan_layers:
    other = stacking.unstack_layers(other)
  np.testing.assert_allclose(other_loss, loss, rtol=1e-6)
  gradient, other = parts.flatten(gradient), parts.flatten(other)
  assert gradient.keys() == other.keys()
  for path, value in gradient.items():
    np.testing.assert_allclose(
      other[path], value, rtol=1e-4, atol=1e-5, err_msg=path
    )


def test_remat_recomputes_the_layers():
  """The backward pass of a rematerialised network stores fewer values."""
  tokens = {'decoder_input_tokens': random_tokens(3, 8)}

  def residuals(model):
    def backward(params):
      return jax.vjp(lambda params: model.logits(params, tokens), params)[1]

    saved = jax.eval_shape(backward, api.shapes(model))
    return sum(x.size for x in jax.tree.leaves(saved))

  assert residuals(tiny('gemma3', remat=True)) < 0.7 * residuals(tiny('gemma3'))


@pytest.mark.parametrize('scan_layers', [False, True])
def test_bfloat16_activations(scan_layers):
  model, params, _ = pair('gemma2')
  tokens = random_tokens(2, LENGTH)
  exact = logits(model, params, input_tokens=tokens)
  if scan_layers:
    params = stacking.stack_layers(params)
  rounded = logits(
    tiny('gemma2', dtype='bfloat16', scan_layers=scan_layers),
    params,
    input_tokens=tokens,
  )
  assert rounded.dtype == np.float32
  error = np.abs(rounded - exact).max() / np.abs(exact).max()
  assert 1e-4 < error < 0.05


@pytest.mark.parametrize('scan_layers', [False, True])
def test_dropout(scan_layers):
  model = tiny('smollm2', dropout_rate=0.5, scan_layers=scan_layers)
  params = random_params(tiny('smollm2'))
  params = stacking.stack_layers(params) if scan_layers else params
  batch = {'decoder_input_tokens': random_tokens(2, 5)}
  without = np.asarray(model.logits(params, batch))
  dropped = jax.jit(lambda key: model.logits(params, batch, key))
  one, other = (dropped(jax.random.key(i)) for i in range(2))
  assert not np.allclose(one, without, atol=0.1)
  assert not np.allclose(one, other, atol=0.1)
  np.testing.assert_array_equal(one, dropped(jax.random.key(0)))


@pytest.mark.parametrize('family', FAMILIES)
def test_every_parameter_has_logical_axes(family):
  for scan in (False, True):
    variables = api.abstract(tiny(family, scan_layers=scan))
    assert variables.keys() == {'params', 'params_axes'}
    axes = {
      path.removesuffix('_axes'): leaf.names
      for path, leaf in parts.flatten(variables['params_axes']).items()
    }
    params = parts.flatten(variables['params'])
    assert axes.keys() == params.keys()
    assert all(len(axes[path]) == params[path].ndim for path in params)
  is_one = tiny(family).config.num_kv_heads == 1
  assert axes['decoder/layers/self_attention/key/kernel'] == (
    'layers',
    'embed',
    'kv' if is_one else 'joined_kv',
  )


def test_sharded_over_a_mesh_of_one_device():
  model, params, _ = pair('gemma3')
  from dst_t5x.engine import partitioning as ours

  tokens = random_tokens(2, LENGTH)
  expected = logits(model, params, input_tokens=tokens)
  with ours.Partitioner().activate():
    lowered = jax.jit(model.logits).lower(
      params, {'decoder_input_tokens': tokens}
    )
    assert '"model"' in lowered.as_text()
    np.testing.assert_array_equal(
      logits(model, params, input_tokens=tokens), expected
    )


def test_a_token_outside_the_vocabulary_is_not_silent():
  model, params, _ = pair('smollm2')
  tokens = np.array([[3, VOCAB, 4]], np.int32)
  assert np.isnan(logits(model, params, input_tokens=tokens)).any()


def test_segments_need_positions():
  model, params, _ = pair('smollm2')
  tokens = random_tokens(1, 4)
  with pytest.raises(ValueError, match='segment ids and positions'):
    model.logits(
      params, {'decoder_input_tokens': tokens, 'decoder_segment_ids': tokens}
    )


@pytest.mark.parametrize(
  ('heads', 'devices', 'share'),
  [
    ((8, 4), 4, (2, 1)),
    ((8, 1), 4, (2, 1)),
    ((32, 8), 16, (2, 2)),
    ((9, 3), 2, (9, 3)),
  ],
)
def test_the_share_of_a_device(heads, devices, share):
  names = ('num_heads', 'num_kv_heads')
  model = tiny('qwen3', **dict(zip(names, heads, strict=True)))
  config = model.share(devices).config
  assert tuple(getattr(config, name) for name in names) == share


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'num_heads': 3, 'num_kv_heads': 2}, 'num_heads 3 must be a multiple'),
    ({'head_dim': 7}, 'head_dim must be even'),
    ({'local_layers': (True,)}, 'local_layers needs a sliding_window'),
    ({'local_layers': ()}, 'at least one layer'),
  ],
)
def test_what_makes_no_network_is_refused(changes, message):
  with pytest.raises(UserError, match=message):
    tiny('llama3', **changes)


def test_rope_factors_must_be_in_order():
  with pytest.raises(UserError, match='must be above'):
    network.Rope(low_frequency_factor=4.0, high_frequency_factor=4.0)


def test_rows_longer_than_the_context_are_refused():
  model, params, _ = pair('smollm2')
  lengths = {'inputs': 100, 'targets': 29}
  with pytest.raises(UserError, match='longer than the context') as caught:
    model.batch_shapes(lengths, 1, pack=True)
  assert '129' in str(caught.value)
  assert '128' in str(caught.value)
  with pytest.raises(UserError, match='longer than the context'):
    model.start_decoding(params, jnp.zeros((1, 100), jnp.int32), 1, 29)
