"""Decoder-only models are served: prompts, tokens of id 0, random answers."""

import asyncio
import functools
import json

import commands
import decoder_only
from fastapi import testclient
import jax
import numpy as np
import pytest
import seqio
import serving
import subsets

from dst_t5x import subsets as subset_lib
from dst_t5x.checkpoints import hf_checkpoint
from dst_t5x.checkpoints import t5x_checkpoint
from dst_t5x.core.errors import UserError
from dst_t5x.models import decoding
from dst_t5x.serving import app as app_lib
from dst_t5x.serving import library as library_lib
from dst_t5x.serving import model as model_lib
from dst_t5x.serving import server
from dst_t5x.serving import service as service_lib
from dst_t5x.serving import texts as texts_lib
from dst_t5x.subsets import fingerprint as fingerprint_lib

LENGTH = 7
BYTES = {'vocab_size': 264, 'eos_id': 1}
BEAM = decoding.BeamSearch(num_beams=3)


@functools.cache
def _seed(family, **changes):
  """Returns a network, its parameters and their fingerprint."""
  # As few layers as there are kinds of them: it compiles faster.
  local = {'local_layers': (True, False)} if family == 'gemma3' else {}
  layers = {'num_layers': 1 + bool(local), **local}
  net = decoder_only.tiny(family, **layers, **changes)
  params = decoder_only.random_params(net)
  # So that answers are less sure, and a subset can change them.
  params['token_embedder']['embedding'] *= 0.3
  return net, params, fingerprint_lib.fingerprint(params)


def _model(family, changes=None, **options):
  net, params, fingerprint = _seed(family, **(changes or {}))
  return model_lib.MultiSubsetModel(
    net,
    lambda: params,
    fingerprint,
    **{'max_decode_length': LENGTH, 'mix_up_to': 1.0, **options},
  )


def _rows(family):
  """Returns rows of several subsets, and the parameters of each."""
  net, params, _ = _seed(family)
  rows = []
  for number, length in ((1, 3), (2, 12), (None, 6), (1, 1)):
    random = np.random.default_rng(length)
    tokens = random.integers(0, decoder_only.VOCAB, length, np.int32)
    tokens[1::4] = 0
    tokens[-1] = net.eos_id  # As the tasks end their inputs.
    found, tuned = None, params
    if number is not None:
      random = np.random.default_rng(number)
      found, tuned = subsets.random_subset(params, 0.1, random)
    rows.append(
      (model_lib.Row(tokens, number, lambda found=found: found), tuned)
    )
  return rows


@pytest.mark.parametrize(
  ('family', 'decoder'),
  [
    ('gemma3', model_lib.GREEDY),
    ('gemma3', BEAM),
    ('llama3', BEAM),
    ('qwen2', model_lib.GREEDY),
    ('smollm2', model_lib.GREEDY),
  ],
)
def test_each_row_is_decoded_as_alone(family, decoder):
  served, net = _model(family), _seed(family)[0]
  rows = _rows(family)
  answers = served.decode([row for row, _ in rows], decoder)
  assert served.counts['swaps'] == 0  # They really were mixed.
  for (row, tuned), answer in zip(rows, answers, strict=True):
    tokens, score = serving.alone(tuned, row.tokens, decoder, net, LENGTH)
    np.testing.assert_array_equal(answer.tokens, tokens)
    assert answer.score == pytest.approx(score, abs=1e-4)
  # The subsets are not without effect.
  row, answer = rows[1][0], answers[1]
  _, score = serving.alone(_seed(family)[1], row.tokens, decoder, net, LENGTH)
  assert abs(answer.score - score) > 1e-2
  serving.assert_seed(served, _seed(family)[1])


def test_rows_with_settings_of_their_own_are_mixed():
  served, net = _model('gemma3'), _seed('gemma3')[0]
  settings = [
    decoding.Sampling(0.8, top_k=20, random_seed=3),
    decoding.Sampling(1.5, top_p=0.8, random_seed=4),
    decoding.Sampling(random_seed=5),
    decoding.Sampling(random_seed=6),
  ]
  rows = [
    (row._replace(sampling=how, number=i), tuned, how)
    for i, ((row, tuned), how) in enumerate(
      zip(_rows('gemma3'), settings, strict=True)
    )
  ]
  answers = served.decode([row for row, _, _ in rows], model_lib.SAMPLING)
  assert served.counts['swaps'] == 0
  for (row, tuned, how), answer in zip(rows, answers, strict=True):
    prompt = net.prompt_of_inputs(row.tokens)
    prompt = np.pad(prompt, (0, 16 - len(prompt)), constant_values=-1)[None]
    tokens, score = jax.jit(
      lambda params, prompt, number, how=how: how(
        net, params, prompt, LENGTH, numbers=number
      )
    )(tuned, prompt, np.int32([row.number]))
    (expected,) = decoding.continuations(net, np.asarray(tokens))
    np.testing.assert_array_equal(answer.tokens, expected)
    assert answer.score == pytest.approx(float(score[0]), abs=1e-4)


def test_new_settings_compile_nothing():
  served = _model('llama3')
  (row, _), *_ = _rows('llama3')

  def decode(**settings):
    how = decoding.Sampling(**settings)
    served.decode([row._replace(sampling=how)], model_lib.SAMPLING)

  decode()
  with serving.compilations() as found:
    decode(temperature=0.5, top_k=3, random_seed=9)
    decode(top_p=0.5)
  assert not found


def test_prompts_are_filled_up_no_further_than_the_longest():
  """The context is 128: a power of two above 65 would not fit."""
  served = _model('gemma3', input_length=65, max_decode_length=60)
  tokens = np.arange(65, dtype=np.int32) % decoder_only.VOCAB
  (answer,) = served.decode([model_lib.Row(tokens)])
  net, params, _ = _seed('gemma3')
  prompt = net.prompt_of_inputs(tokens)[None]
  expected, _ = jax.jit(
    lambda params, prompt: model_lib.GREEDY(net, params, prompt, 60)
  )(params, prompt)
  (expected,) = decoding.continuations(net, np.asarray(expected))
  np.testing.assert_array_equal(answer.tokens, expected)
  with pytest.raises(UserError, match=r'129 tokens .* this model, 128'):
    _model('gemma3', input_length=68, max_decode_length=60)


@pytest.fixture
def client(tmp_path):
  """A server of a Gemma of bytes, with a subset."""
  _, params, fingerprint = _seed('gemma3', **BYTES)
  served = _model('gemma3', BYTES, input_length=32)
  found, _ = subsets.random_subset(params, 0.02, np.random.default_rng(1))
  assert found.fingerprint == fingerprint
  subset_lib.save(tmp_path / 'one.dst', found, {})
  library = library_lib.Library(
    str(tmp_path), served.layout, library_lib.Limits(share=0.5)
  )
  texts = texts_lib.Texts(seqio.ByteVocabulary(), 32)
  service = service_lib.Service(served, library, texts)
  with testclient.TestClient(app_lib.create_app(service)) as client:
    yield client


def _generate(client, status=200, **request):
  response = client.post('/generate', json=request)
  assert response.status_code == status, response.text
  return response.json()


def test_a_prompt_begins_and_has_no_end(client):
  net, params, _ = _seed('gemma3', **BYTES)
  assert (net.begin_id, net.eos_id) == (2, 1)
  vocabulary = seqio.ByteVocabulary()
  for text in ('ab', ''):
    (output,) = _generate(client, inputs=[text])['outputs']
    prompt = np.array([[2, *vocabulary.encode(text)]], np.int32)
    tokens, score = decoding.GreedyDecoder()(net, params, prompt, LENGTH)
    (expected,) = decoding.continuations(net, np.asarray(tokens))
    assert output['text'] == vocabulary.decode(expected.tolist())
    assert output['tokens'] == len(expected)
    assert output['score'] == pytest.approx(float(score[0]), abs=1e-4)


def test_answers_are_drawn_by_seed(client):
  request = {'inputs': ['ab', 'ab', 'cd'], 'decoder': 'sample'}

  def texts(**more):
    outputs = _generate(client, **{**request, **more})['outputs']
    return [output['text'] for output in outputs]

  one = texts(random_seed=1, temperature=1.5)
  assert texts(random_seed=1, temperature=1.5) == one
  assert texts(random_seed=1, temperature=1.5, inputs=['ab']) == one[:1]
  assert texts(random_seed=2, temperature=1.5) != one
  assert one[0] != one[1]  # Inputs of a request are drawn apart.
  greedy = _generate(client, inputs=request['inputs'])['outputs']
  assert texts(random_seed=1, top_k=1) == [o['text'] for o in greedy]


@pytest.mark.parametrize(
  ('request_', 'message'),
  [
    ({'temperature': 0.5}, 'temperature has no effect on .*greedy'),
    ({'decoder': 'beam', 'top_k': 3}, 'top_k has no effect on .*beam'),
    ({'decoder': 'sample', 'temperature': 0}, 'temperature'),
    ({'decoder': 'sample', 'top_k': 0}, 'top_k'),
    ({'decoder': 'sample', 'top_p': 1.5}, 'top_p'),
    ({'decoder': 'sample', 'random_seed': 2**31}, 'random_seed'),
  ],
)
def test_settings_that_make_no_sense(client, request_, message):
  import re

  error = _generate(client, 422, inputs=['ab'], **request_)['error']
  assert re.search(message, error)
  assert '\n' not in error


@pytest.mark.parametrize('eos_id', [0, 1])
def test_tokens_of_id_0_count(eos_id):
  """0 is a token of Llama and Qwen, and the end of SmolLM2."""
  served = _model('smollm2', {'eos_id': eos_id})
  # A bias towards token 0, through its own embedding.
  net, params, _ = _seed('smollm2', eos_id=eos_id)
  table = params['token_embedder']['embedding'].copy()
  table[0] = 100 * np.sign(table[5])
  tuned = {**params, 'token_embedder': {'embedding': table}}
  from dst_t5x.subsets import extraction

  found = extraction.extract(tuned, params, _seed('smollm2', eos_id=eos_id)[2])
  rows = [
    model_lib.Row(np.int32([number]), 'zero', lambda: found)
    for number in range(2, 30)
  ]
  answers = served.decode(rows)
  expected = [serving.alone(tuned, row.tokens, net=net, length=LENGTH)[0]
              for row in rows]  # fmt: skip
  for answer, tokens in zip(answers, expected, strict=True):
    np.testing.assert_array_equal(answer.tokens, tokens)
    # Nothing is behind an end token, and nothing is missing before.
    assert eos_id not in tokens[:-1]
    assert len(tokens) == LENGTH or tokens[-1] == eos_id
  lengths = {len(a.tokens) for a in answers if 0 in a.tokens}
  assert lengths  # Some have it.
  assert (LENGTH in lengths) if eos_id else (min(lengths) < LENGTH)


_GIN = commands.TESTS / 'decoder_only.gin'


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
  """A T5X checkpoint of the network of decoder_only.gin."""
  from dst_t5x.serving import networks

  net = networks.of_gin([f'--gin_file={_GIN}'])
  params = decoder_only.random_params(net)
  folder = tmp_path_factory.mktemp('t5x') / 'seed'
  t5x_checkpoint.save(folder, params, 3)
  return folder, params


def _options(seed, folder, *more):
  return server._parser().parse_args(
    [f'--seed={seed}', f'--subsets={folder}', '--input-length=16',
     '--output-length=16', *more]
  )  # fmt: skip


def test_it_answers_as_infer_does(checkpoint, tmp_path):
  seed, params = checkpoint
  inputs = ['abc', 'hgfe', 'a longer one']
  file = tmp_path / 'inputs.txt'
  file.write_text('\n'.join(inputs) + '\n')
  found, _ = subsets.random_subset(params, 0.05, np.random.default_rng(1))
  (tmp_path / 'subsets').mkdir()
  subset_lib.save(tmp_path / 'subsets' / 'one.dst', found, {})
  options = _options(seed, tmp_path / 'subsets')
  options.gin = [f'--gin_file={_GIN}']
  service = server.make_service(options)
  draw = {'temperature': 1.3, 'random_seed': 4}
  for name, how in ((None, {}), ('one', {}), ('one', draw)):
    output = tmp_path / f'{name}{len(how)}'
    flags = commands.flags(
      CHECKPOINT_PATH=tmp_path / 'subsets' / 'one.dst' if name else seed,
      INFER_OUTPUT_DIR=output,
      INPUT_FILE=file,
      **({'INITIAL_CHECKPOINT_PATH': seed} if name else {}),
    )
    if how:
      flags.append('--gin.DECODER=@decoding.Sampling()')
      flags += [f'--gin.Sampling.{k}={v}' for k, v in how.items()]
    infer = f'--gin_file={_GIN}', '--gin_file=gin/runs/infer.gin'
    commands.call('infer', *infer, *flags)
    lines = (output / 'predictions.jsonl').read_text().splitlines()
    expected = [json.loads(line)['prediction'] for line in lines]
    outputs, _ = asyncio.run(
      service.generate(
        inputs,
        name,
        None,
        'sample' if how else 'greedy',
        60.0,
        decoding.Sampling(**how),
      )
    )
    assert [o.text for o in outputs] == expected
    assert len(set(expected)) > 1
  service.scheduler.close()


def test_a_checkpoint_without_its_sizes_needs_the_gin_file(
  checkpoint, tmp_path
):
  options = _options(checkpoint[0], tmp_path, '--vocabulary=bytes')
  options.gin = []
  with pytest.raises(UserError, match=r'heads .*--gin_file=gin') as error:
    server.make_service(options)
  assert '\n' not in str(error.value)


def test_a_folder_of_hugging_face_states_its_network(tmp_path):
  net, params, _ = _seed('gemma3', **BYTES, begin_id=None)
  hf_checkpoint.save(tmp_path / 'seed', params, net)
  options = _options(tmp_path / 'seed', tmp_path / 'x', '--vocabulary=bytes')
  options.gin = []
  # Its Gemma begins with token 2, bytes do not.
  with pytest.raises(UserError, match='begin with token None'):
    server.make_service(options)
