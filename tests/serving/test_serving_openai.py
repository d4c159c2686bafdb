"""OpenAI's interface, with OpenAI's own client over a socket."""

import http.client
import json
import time

import decoder_only
from fastapi import testclient
from fixtures_tokenizers import tokenizer_folders  # noqa: F401
import numpy as np
import openai
import pytest
import serving
import subsets

from dst_t5x import subsets as subset_lib
from dst_t5x.data import conversations
from dst_t5x.data import vocabulary as vocabulary_lib
from dst_t5x.serving import app as app_lib
from dst_t5x.serving import growing_text
from dst_t5x.serving import library as library_lib
from dst_t5x.serving import model as model_lib
from dst_t5x.serving import service as service_lib
from dst_t5x.serving import texts as texts_lib
from dst_t5x.subsets import fingerprint as fingerprint_lib

LENGTH = 24
PROMPTS = ['en: English', 'de: ', 'a']
MESSAGES = [
  {'role': 'system', 'content': 'Be brief.'},
  {'role': 'user', 'content': 'Italian?'},
]


class _Served:
  """A server of a small Llama, its parts and its address."""

  def __init__(self, tokenizer, folder):
    self.vocabulary = vocabulary_lib.chosen(str(tokenizer))
    self.chat = vocabulary_lib.chosen(str(tokenizer), chat_template=True)
    self.net = decoder_only.tiny(
      'llama3',
      num_layers=1,
      vocab_size=self.vocabulary.vocab_size,
      eos_id=self.vocabulary.eos_id,
      begin_id=self.vocabulary.begin_id,
      context_length=256,
    )
    self.seed = decoder_only.random_params(self.net)
    random = np.random.default_rng(1)
    found, self.tuned = subsets.random_subset(self.seed, 0.1, random)
    subset_lib.save(folder / 'one.dst', found, {})
    (folder / 'bad.dst').write_bytes(b'damaged')
    model = model_lib.MultiSubsetModel(
      self.net,
      lambda: self.seed,
      fingerprint_lib.fingerprint(self.seed),
      max_decode_length=LENGTH,
      input_length=100,
      mix_up_to=1.0,
    )
    limits = library_lib.Limits(share=0.5)
    library = library_lib.Library(str(folder), model.layout, limits)
    texts = texts_lib.Texts(self.vocabulary, 100)
    options = service_lib.Options(name='base', deadline=600.0)
    self.service = service_lib.Service(model, library, texts, options)
    self.app = app_lib.create_app(self.service)

  def expected(self, ids, name):
    """Returns the tokens of a dense model, with the end token."""
    params = self.tuned if name == 'one' else self.seed
    row = np.int32([*ids, self.net.eos_id])
    return serving.alone(params, row, net=self.net, length=LENGTH)[0].tolist()

  def wait_until_idle(self):
    end = time.monotonic() + 60
    while self.service.scheduler._stepper:
      assert time.monotonic() < end
      time.sleep(0.005)


def _client(port, key='none'):
  return openai.OpenAI(
    base_url=f'http://127.0.0.1:{port}/v1',
    api_key=key,
    max_retries=0,
    timeout=600,
    http_client=openai.DefaultHttpxClient(trust_env=False),
  )


@pytest.fixture(scope='module')
def served(tokenizer_folders, tmp_path_factory):  # noqa: F811
  folder = tmp_path_factory.mktemp('subsets')
  served = _Served(tokenizer_folders('llama3'), folder)
  with serving.listening(served.app) as port:
    served.port = port
    yield served


@pytest.fixture
def client(served):
  with _client(served.port) as client:
    yield client


def _text(chunks):
  return ''.join(c.choices[0].text for c in chunks if c.choices)


def test_models_are_the_base_and_its_subsets(client):
  models = client.models.list().data
  assert [model.id for model in models] == ['base', 'one']  # None damaged.
  assert [model.parent for model in models] == [None, 'base']
  assert client.models.retrieve('one').object == 'model'
  with pytest.raises(openai.NotFoundError) as error:
    client.models.retrieve('two')
  assert error.value.code == 'model_not_found'
  assert error.value.param == 'model'


@pytest.mark.parametrize('name', ['base', 'one'])
def test_generate_answers_as_each_row_alone(served, name):
  subset = {} if name == 'base' else {'subset': name}
  body = json.dumps({'inputs': PROMPTS, **subset})
  connection = http.client.HTTPConnection('127.0.0.1', served.port)
  headers = {'Content-Type': 'application/json'}
  connection.request('POST', '/generate', body, headers)
  outputs = json.loads(connection.getresponse().read())['outputs']
  connection.close()
  expected = [
    served.expected(served.vocabulary.encode(prompt), name)
    for prompt in PROMPTS
  ]
  assert [o['tokens'] for o in outputs] == [len(e) for e in expected]
  assert [o['text'] for o in outputs] == [
    served.vocabulary.decode(ids) for ids in expected
  ]


@pytest.mark.parametrize('name', ['base', 'one'])
def test_completions(served, client, name):
  ids = [served.vocabulary.encode(prompt) for prompt in PROMPTS]
  expected = [served.expected(of, name) for of in ids]
  texts = [served.vocabulary.decode(of) for of in expected]
  with_begin = [[served.net.begin_id, *of] for of in ids]
  for prompt in (PROMPTS, ids, with_begin):
    found = client.completions.create(
      model=name, prompt=prompt, temperature=0, max_tokens=LENGTH
    )
    assert [choice.text for choice in found.choices] == texts
    assert [choice.index for choice in found.choices] == [0, 1, 2]
    for choice, tokens in zip(found.choices, expected, strict=True):
      ends = tokens[-1] == served.net.eos_id
      assert choice.finish_reason == ('stop' if ends else 'length')
    # Each has the token that begins every text.
    assert found.usage.prompt_tokens == sum(len(of) + 1 for of in ids)
    assert found.usage.completion_tokens == sum(map(len, expected))
  short = client.completions.create(
    model=name, prompt=PROMPTS[0], temperature=0
  )
  assert short.usage.completion_tokens == min(16, len(expected[0]))


def test_a_stream_is_the_whole_in_pieces(served, client):
  options = {'model': 'one', 'prompt': PROMPTS[0], 'temperature': 0}
  options['max_tokens'] = LENGTH
  whole = client.completions.create(**options)
  *chunks, last = client.completions.create(
    **options, stream=True, stream_options={'include_usage': True}
  )
  assert _text(chunks) == whole.choices[0].text
  assert len({chunk.id for chunk in chunks}) == 1
  assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
  assert all(chunk.choices[0].finish_reason is None for chunk in chunks[:-1])
  assert (last.choices, last.usage) == ([], whole.usage)
  # Without the option no chunk has the usage.
  for chunk in client.completions.create(**options, stream=True):
    assert chunk.choices
    assert chunk.usage is None


@pytest.mark.parametrize('name', ['base', 'one'])
def test_chats_use_the_chat_template(served, client, name):
  asked = conversations.to_text(MESSAGES)
  ids = served.chat.encode(asked)
  tokens = served.expected(ids, name)
  options = {'model': name, 'messages': MESSAGES, 'temperature': 0}
  whole = client.chat.completions.create(**options)
  (choice,) = whole.choices
  assert choice.message.role == 'assistant'
  assert choice.message.content == served.chat.decode(tokens)
  assert whole.usage.prompt_tokens == len(ids) + 1
  assert whole.usage.completion_tokens == len(tokens)
  first, *chunks = client.chat.completions.create(**options, stream=True)
  assert first.choices[0].delta.role == 'assistant'
  said = [chunk.choices[0].delta.content or '' for chunk in chunks]
  assert ''.join(said) == choice.message.content
  assert chunks[-1].choices[0].finish_reason == choice.finish_reason
  # The same in OpenAI's other words.
  system, user = MESSAGES
  parts = [{'type': 'text', 'text': user['content']}]
  other = client.chat.completions.create(
    model=name,
    messages=[{**system, 'role': 'developer'}, {**user, 'content': parts}],
    temperature=0,
    max_completion_tokens=3,
  )
  assert other.usage.prompt_tokens == whole.usage.prompt_tokens
  assert other.usage.completion_tokens == min(3, len(tokens))


@pytest.mark.parametrize('stream', [False, True])
def test_stop_strings(served, client, stream):
  options = {'model': 'one', 'prompt': PROMPTS[0], 'temperature': 0}
  options['max_tokens'] = LENGTH
  text = client.completions.create(**options).choices[0].text
  for stop in (text[4:7], ['never so', text[5:6], text[4:9]]):
    stops = [stop] if isinstance(stop, str) else stop
    expected = text[: min(text.find(s) for s in stops if s in text)]
    found = client.completions.create(**options, stop=stop, stream=stream)
    if stream:
      chunks = list(found)
      assert _text(chunks) == expected
      choice = chunks[-1].choices[0]
    else:
      (choice,) = found.choices
      assert choice.text == expected
      assert found.usage.completion_tokens < LENGTH
    assert choice.finish_reason == 'stop'
  served.wait_until_idle()


def test_answers_are_drawn_by_seed(client):
  def text(**options):
    found = client.completions.create(
      model='one', prompt='a', max_tokens=8, **options
    )
    return found.choices[0].text

  assert text(seed=3) == text(seed=3, temperature=1.0, top_p=1.0)
  assert text(seed=3) != text(seed=4)
  assert text(seed=3, top_p=1e-6) == text(temperature=0)
  assert text(seed=3, extra_body={'top_k': 1}) == text(temperature=0)
  assert text() == text(seed=0)


def test_log_probabilities(served, client):
  options = {'model': 'one', 'temperature': 0}
  found = client.completions.create(
    **options, prompt='a', max_tokens=5, logprobs=2
  ).choices[0]
  logprobs = found.logprobs
  assert ''.join(logprobs.tokens) == found.text
  assert logprobs.text_offset[0] == 0
  for token, logprob, top in zip(
    logprobs.tokens,
    logprobs.token_logprobs,
    logprobs.top_logprobs,
    strict=True,
  ):
    assert top[token] == pytest.approx(logprob, abs=1e-5)  # It is the best.
    assert max(top.values()) == top[token] < 0
  chunks = client.chat.completions.create(
    **options,
    messages=MESSAGES,
    max_tokens=5,
    logprobs=True,
    top_logprobs=20,
    stream=True,
  )
  entries = [
    entry
    for chunk in chunks
    if chunk.choices[0].logprobs
    for entry in chunk.choices[0].logprobs.content
  ]
  assert entries
  for entry in entries:
    assert len(entry.top_logprobs) == 20
    assert entry.top_logprobs[0].token == entry.token
  plain = client.chat.completions.create(
    **options, messages=MESSAGES, max_tokens=1, logprobs=True
  )
  assert plain.choices[0].logprobs.content[0].top_logprobs == []


_IMAGE = {'type': 'image_url', 'image_url': {'url': 'data:'}}
_TOOL = {'type': 'function', 'function': {'name': 'f'}}


@pytest.mark.parametrize(
  ('options', 'parameter', 'message'),
  [
    ({'n': 2}, 'n', 'another seed'),
    ({'tools': [_TOOL]}, 'tools', 'describe them'),
    ({'response_format': {'type': 'json_object'}}, 'response_format', 'form'),
    ({'presence_penalty': 0.5}, 'presence_penalty', 'leave it out'),
    ({'logit_bias': {'1': 5}}, 'logit_bias', 'leave it out'),
    ({'extra_body': {'beams': 2}}, 'beams', 'there is no option'),
    ({'max_tokens': LENGTH + 1}, 'max_tokens', '--output-length=25'),
    ({'max_tokens': 0}, 'max_tokens', 'greater than'),
    ({'max_tokens': 2, 'max_completion_tokens': 3}, 'max_tokens', 'differ'),
    ({'temperature': -1}, 'temperature', 'greater than'),
    ({'temperature': 1e-9}, 'temperature', 'at least 1e-6'),
    ({'top_p': 2}, 'top_p', 'less than'),
    ({'seed': 2**31}, 'seed', 'less than'),
    ({'top_logprobs': 2}, 'top_logprobs', '"logprobs": true'),
    ({'stream_options': {'include_usage': True}}, 'stream_options', 'stream'),
    ({'messages': []}, 'messages', 'at least 1'),
    ({'messages': [{'role': 'wizard', 'content': ''}]}, 'messages', 'wizard'),
    ({'messages': [{'role': 'user'}]}, 'messages', 'content'),
    (
      {'messages': [{'role': 'user', 'content': [_IMAGE]}]},
      'messages[0].content',
      'reads text only',
    ),
  ],
)
def test_what_is_not_supported_is_refused_by_name(
  client, options, parameter, message
):
  request = {'model': 'base', 'messages': MESSAGES, **options}
  with pytest.raises(openai.BadRequestError) as error:
    client.chat.completions.create(**request)
  body = error.value.body
  assert body['param'] == parameter
  assert body['type'] == 'invalid_request_error'
  assert parameter.partition('[')[0] in body['message']
  assert message in body['message']
  assert '\n' not in body['message']


def test_options_with_values_that_change_nothing_are_taken(client):
  client.chat.completions.create(
    model='base',
    messages=MESSAGES,
    max_tokens=1,
    n=1,
    tools=[],
    tool_choice='none',
    presence_penalty=0,
    logit_bias={},
    response_format={'type': 'text'},
    user='somebody',
    store=False,
  )
  client.completions.create(
    model='base', prompt='a', max_tokens=1, best_of=1, echo=False, suffix=None
  )


def test_other_errors_have_openais_form(served, client):
  with pytest.raises(openai.NotFoundError) as error:
    client.completions.create(model='onf', prompt='a')
  assert error.value.code == 'model_not_found'
  assert "did you mean 'one'" in error.value.body['message']
  with pytest.raises(openai.BadRequestError, match='no subset file'):
    client.completions.create(model='bad', prompt='a')
  with pytest.raises(openai.BadRequestError, match='pieces'):
    client.completions.create(model='base', prompt='1 ' * 200, stream=True)
  with pytest.raises(openai.BadRequestError, match='the vocabulary ends'):
    client.completions.create(model='base', prompt=[10**6])
  with pytest.raises(openai.NotFoundError, match='/v1/chat/completions'):
    client.embeddings.create(model='base', input='a')
  # Not as a context, which would end the service.
  other = testclient.TestClient(served.app)
  response = other.post('/v1/completions', content=b'{}')
  assert response.status_code == 415
  assert 'Content-Type' in response.json()['error']['message']


def test_a_client_that_leaves_ends_its_answer(served, client):
  stream = client.completions.create(
    model='one', prompt='a', temperature=0, max_tokens=LENGTH, stream=True
  )
  next(iter(stream))
  stream.close()
  served.wait_until_idle()


def test_the_token_is_the_key(tmp_path):
  app = app_lib.create_app(serving.service(tmp_path), token='secret')
  with serving.listening(app) as port:
    with (
      _client(port, 'other') as client,
      pytest.raises(openai.AuthenticationError) as error,
    ):
      client.models.list()
    assert error.value.code == 'invalid_api_key'
    # The right one gets as far as the model, which cannot be used here.
    with (
      _client(port, 'secret') as client,
      pytest.raises(openai.BadRequestError, match='decoder-only'),
    ):
      client.models.list()


@pytest.mark.parametrize(
  ('method', 'path'),
  [('get', 'models'), ('post', 'completions'), ('post', 'chat/completions')],
)
def test_an_encoder_decoder_is_refused(tmp_path, method, path):
  app = app_lib.create_app(serving.service(tmp_path))
  request = {'model': 'm', 'prompt': 'a', 'messages': MESSAGES}
  with testclient.TestClient(app) as client:
    more = {'json': request} if method == 'post' else {}
    response = getattr(client, method)(f'/v1/{path}', **more)
  assert response.status_code == 400
  assert 'POST /generate' in json.loads(response.text)['error']['message']


def _grow(texts, stops=()):
  """Returns what is given out when the text grows like this."""
  growing = growing_text.GrowingText(lambda ids: texts[ids[-1]], stops)
  found = []
  for number in range(len(texts)):
    found.append(growing.add(number))
    if growing.is_stopped:
      return [*found, None]
  return [*found, growing.end()]


@pytest.mark.parametrize(
  ('texts', 'stops', 'expected'),
  [
    (['a', 'ab'], (), ['a', 'b', '']),
    (['a', 'ab', 'abc'], ('bd',), ['a', '', 'bc', '']),
    (['a', 'ab'], ('bd',), ['a', '', 'b']),
    (['a', 'ab', 'abd'], ('bd',), ['a', '', '', None]),
    (['xay'], ('y', 'ay'), ['x', None]),
    (['a', 'a\ufffd', 'aé'], (), ['a', '', 'é', '']),
    (['a', 'a\ufffd'], (), ['a', '', '\ufffd']),
    (['a ', 'ab', 'a b'], (), ['a ', '', 'b', '']),
  ],
)
def test_text_is_given_out_when_it_is_certain(texts, stops, expected):
  assert _grow(texts, stops) == expected
