"""The inputs of decoder-only networks: rows, prompts and losses."""

from decoder_only import random_params
from decoder_only import tiny
import jax
import numpy as np
import pytest
import tensorflow as tf

from dst_t5x.adapters import prompts as prompts_lib
from dst_t5x.core import parts
from dst_t5x.engine import losses
from dst_t5x.models import adapted

# Id 0 is a token, and 1 the end.
EXAMPLES = [
  ([0, 5, 0, 1], [7, 0, 1]),
  ([8, 9, 1], [0, 1]),
  ([6], [0, 0, 3, 1]),
]
LENGTHS = {'inputs': 5, 'targets': 4}


def _rows(model, pack, lengths=LENGTHS, examples=EXAMPLES):
  """Returns name -> [rows, length], as the feature converter makes them."""
  spec = {name: tf.TensorSpec([None], tf.int32) for name in lengths}
  dataset = tf.data.Dataset.from_generator(
    lambda: (dict(zip(lengths, pair, strict=True)) for pair in examples),
    output_signature=spec,
  )
  converter = model.feature_converter(pack)
  rows = list(converter(dataset, lengths).as_numpy_iterator())
  return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


@pytest.mark.parametrize('pack', [False, True])
@pytest.mark.parametrize('family', ['llama3', 'gemma'])
def test_shapes_are_as_announced(family, pack):
  model = tiny(family)
  rows = _rows(model, pack)
  count = len(rows['decoder_input_tokens'])
  shapes = {name: value.shape for name, value in rows.items()}
  assert shapes == model.batch_shapes(LENGTHS, count, pack)


def test_rows_without_a_token_that_begins():
  rows = _rows(tiny('llama3'), pack=False)
  expected = {
    'input_tokens': [0, 5, 0, 7, 0, 1, 0, 0, 0],
    'target_tokens': [5, 0, 7, 0, 1, 0, 0, 0, 0],
    'loss_weights': [0, 0, 1, 1, 1, 0, 0, 0, 0],
    'causal_attention': [1, 1, 1, 0, 0, 0, 0, 0, 0],
  }
  for name, row in expected.items():
    assert rows[f'decoder_{name}'][0].tolist() == row, name


def test_rows_with_a_token_that_begins():
  rows = _rows(tiny('llama3', begin_id=4), pack=False)
  expected = {
    'input_tokens': [4, 6, 0, 0, 3, 1, 0, 0, 0],
    'target_tokens': [6, 0, 0, 3, 1, 0, 0, 0, 0],
    'loss_weights': [0, 1, 1, 1, 1, 0, 0, 0, 0],
    'causal_attention': [1, 1, 0, 0, 0, 0, 0, 0, 0],
  }
  for name, row in expected.items():
    assert rows[f'decoder_{name}'][2].tolist() == row, name


def test_packed_rows():
  lengths = {'inputs': 6, 'targets': 5}
  rows = _rows(tiny('llama3'), pack=True, lengths=lengths)
  expected = {
    'input_tokens': [0, 5, 0, 7, 0, 8, 9, 0, 0, 0, 0],
    'target_tokens': [5, 0, 7, 0, 1, 9, 0, 1, 0, 0, 0],
    'loss_weights': [0, 0, 1, 1, 1, 0, 1, 1, 0, 0, 0],
    'segment_ids': [1, 1, 1, 1, 1, 2, 2, 2, 0, 0, 0],
    'positions': [0, 1, 2, 3, 4, 0, 1, 2, 0, 0, 0],
  }
  for name, row in expected.items():
    assert rows[f'decoder_{name}'][0].tolist() == row, name


@pytest.mark.parametrize('begin_id', [None, 4])
def test_the_longest_example_is_whole(begin_id):
  examples = [([5, 6, 7, 8, 9], [2, 3, 4, 1])]
  for pack in (False, True):
    rows = _rows(tiny('llama3', begin_id=begin_id), pack, examples=examples)
    is_target = rows['decoder_loss_weights'][0] > 0
    targets = rows['decoder_target_tokens'][0][is_target]
    assert targets.tolist() == [2, 3, 4, 1]


@pytest.mark.parametrize('family', ['gemma3', 'smollm2'])
def test_loss_of_packed_rows_is_that_of_single_rows(family):
  model = tiny(family)
  params = random_params(model)
  lengths = {'inputs': 9, 'targets': 8}

  def sums(pack):
    batch = _rows(model, pack, lengths)
    found = jax.jit(
      lambda params, batch: losses.Loss().sums(
        model.logits(params, batch), model.targets(batch)
      )
    )(params, batch)
    return len(batch['decoder_input_tokens']), found

  (rows, packed), (single_rows, single) = sums(True), sums(False)
  assert rows < single_rows
  assert packed.tokens == single.tokens == sum(len(t) for _, t in EXAMPLES)
  for name in ('loss', 'cross_entropy', 'correct'):
    one, other = getattr(packed, name), getattr(single, name)
    np.testing.assert_allclose(one, other, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize('begin_id', [None, 4])
def test_prompts_of_examples_and_of_inputs_are_the_same(begin_id):
  model = tiny('llama3', begin_id=begin_id)
  rows = _rows(model, pack=False)
  for i, (inputs, _) in enumerate(EXAMPLES):
    example = {name: value[i] for name, value in rows.items()}
    of_example = model.prompt(example)
    padded = np.full(LENGTHS['inputs'], model.pad_id, np.int32)
    padded[: len(inputs)] = inputs
    of_inputs = model.prompt_of_inputs(padded)
    begin = [] if begin_id is None else [begin_id]
    tokens = [*begin, *(inputs[:-1] if inputs[-1] == 1 else inputs)]
    for prompt in (of_example, of_inputs):
      assert prompt[prompt != model.pad_id].tolist() == tokens
      assert prompt[: len(tokens)].tolist() == tokens


def test_an_example_without_targets_is_all_prompt():
  examples = [([5, 0], []), ([], [])]
  model = tiny('llama3')
  rows = _rows(model, pack=False, examples=examples)
  prompts = [
    model.prompt({name: value[i] for name, value in rows.items()})
    for i in range(2)
  ]
  assert prompts[0][:3].tolist() == [5, 0, model.pad_id]
  assert (prompts[1] == model.pad_id).all()


def test_a_trained_prompt_is_before_everything():
  base = tiny('llama3', begin_id=4)
  model = adapted.with_adapter(base, prompts_lib.Prompt(length=2))
  first = [base.vocab_size, base.vocab_size + 1, 4]
  inputs = np.array([5, 6, -1], np.int32)
  prompt = model.prompt_of_inputs(inputs)
  assert prompt.tolist() == [*first, 5, 6, -1]
  lengths = {'inputs': 3, 'targets': 2}
  rows = _rows(model, False, lengths, [([5, 6, 1], [7, 1])])
  assert rows['decoder_input_tokens'][0].tolist() == [*first, 5, 6, 7, 1][:7]
  shapes = {name: value.shape for name, value in rows.items()}
  assert shapes == model.batch_shapes(lengths, 1, pack=False)
  # Its vectors are looked up, in training and in decoding.
  params = jax.jit(model.initialize)(jax.random.key(0))['params']
  forced = model.logits(params, rows)
  start = model.start_decoding(params, prompt[None], 1, 2)
  decoded, _ = start.step(start.first, start.cache)
  assert np.isfinite(forced).all()
  np.testing.assert_allclose(decoded[0], forced[0, 4], atol=1e-5)


def test_work_counts_what_tokens_meet():
  model = tiny('llama3')
  shapes = parts.flatten(random_params(model))
  kernels = sum(x.size for path, x in shapes.items() if path.endswith('kernel'))
  work = model.work_of_example(shapes, LENGTHS)
  assert work == (9, 9 * kernels)
  tied = tiny('smollm2')
  shapes = parts.flatten(random_params(tied))
  kernels = sum(x.size for path, x in shapes.items() if path.endswith('kernel'))
  table = shapes['token_embedder/embedding'].size
  assert tied.work_of_example(shapes, LENGTHS).products == 9 * (kernels + table)
