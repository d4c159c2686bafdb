"""Rows join and leave a running batch, and are decoded as each alone."""

import functools
import threading
import time

import decoder_only
import jax
import numpy as np
import pytest
import serving
import subsets

from dst_t5x.core.errors import UserError
from dst_t5x.models import api
from dst_t5x.models import decoding
from dst_t5x.serving import model as model_lib
from dst_t5x.serving import requests as requests_lib
from dst_t5x.serving import running as running_lib
from dst_t5x.serving import scheduler as scheduler_lib
from dst_t5x.serving import steps
from dst_t5x.subsets import fingerprint as fingerprint_lib

LENGTH = 7


@functools.cache
def _seed(family):
  """Returns a network, its parameters and their fingerprint."""
  local = {'local_layers': (True, False)} if family == 'gemma3' else {}
  net = decoder_only.tiny(family, num_layers=1 + bool(local), **local)
  params = decoder_only.random_params(net)
  # So that answers are less sure, and a subset can change them.
  params['token_embedder']['embedding'] *= 0.3
  return net, params, fingerprint_lib.fingerprint(params)


def _model(family='smollm2', **options):
  net, params, fingerprint = _seed(family)
  return model_lib.MultiSubsetModel(
    net,
    lambda: params,
    fingerprint,
    **{
      'max_decode_length': LENGTH,
      'input_length': 12,
      'mix_up_to': 1.0,
      **options,
    },
  )


@functools.cache
def _subset(family, number, share):
  random = np.random.default_rng(number)
  return subsets.random_subset(_seed(family)[1], share, random)


def _row(number, length, family='smollm2', share=0.1):
  """Returns a row with a subset, or None for the seed, and its parameters."""
  random = np.random.default_rng(length)
  tokens = random.integers(2, decoder_only.VOCAB, length, dtype=np.int32)
  if number is None:
    return model_lib.Row(tokens), _seed(family)[1]
  found, tuned = _subset(family, number, share)
  return model_lib.Row(tokens, (number, share), lambda: found), tuned


def _expected(row, params, family='smollm2'):
  """Returns the tokens of the row alone."""
  net = _seed(family)[0]
  return serving.alone(params, row.tokens, net=net, length=LENGTH)


@pytest.mark.parametrize('family', ['smollm2', 'gemma3'])
def test_rows_that_join_and_leave_are_decoded_as_alone(family):
  served = _model(family)
  batch = running_lib.make(served, 4)
  kinds = [(1, 3), (None, 12), (2, 6), (1, 1), (3, 9), (None, 2)]
  waiting = [
    # The last subset is of a larger class than the others.
    _row(number, length, family, 0.6 if number == 3 else 0.1)
    for number, length in kinds
  ]
  decoded, found = {}, {}
  numbers = iter(range(len(waiting)))

  def join():
    if len(batch) == batch.count:
      assert batch.join([running_lib.Ask(waiting[0][0])]) == [None]
    elif (number := next(numbers, None)) is not None:
      (slot,) = batch.join([running_lib.Ask(waiting[number][0])])
      decoded[slot] = number
      found[number] = []

  join()
  while len(batch):
    join()  # One more before every step, while there are some.
    for slot, token in batch.step().items():
      answer = found[decoded[slot]]
      answer.append(token)
      if token.id == _seed(family)[0].eos_id or len(answer) == LENGTH:
        batch.leave(slot)
  assert sorted(found) == list(range(len(waiting)))
  for number, (row, tuned) in enumerate(waiting):
    tokens, score = _expected(row, tuned, family)
    assert [token.id for token in found[number]] == tokens.tolist()
    total = sum(token.logprob for token in found[number])
    assert total == pytest.approx(score, abs=1e-4)
  serving.assert_seed(served, _seed(family)[1])


def test_what_is_drawn_does_not_depend_on_the_others():
  served = _model()
  how = decoding.Sampling(1.3, top_k=20, random_seed=5)
  row = _row(1, 5)[0]._replace(sampling=how, number=2)
  ask = running_lib.Ask(row, model_lib.SAMPLING, alternatives=True)
  alone, mixed = [], []
  for others, tokens in (([], alone), ([_row(2, 7)[0]], mixed)):
    batch = running_lib.make(served, 4)
    for other in others:
      batch.join([running_lib.Ask(other)])
      batch.step()
    (slot,) = batch.join([ask])
    tokens += [batch.step()[slot] for _ in range(LENGTH)]
  assert [t.id for t in alone] == [t.id for t in mixed]
  for token in alone:
    assert len(token.alternatives) == steps.ALTERNATIVES
    logprobs = [logprob for _, logprob in token.alternatives]
    assert logprobs == sorted(logprobs, reverse=True)
    known = dict(token.alternatives)
    if token.id in known:
      assert known[token.id] == pytest.approx(token.logprob, abs=1e-5)
  (answer,) = served.decode([row], model_lib.SAMPLING)
  ended = [t.id for t in alone][: len(answer.tokens)]
  assert ended == answer.tokens.tolist()


def test_a_new_subset_of_a_class_compiles_nothing():
  batch = running_lib.make(_model(), 2)
  batch.warm_up([_row(1, 3)[0], _row(None, 3)[0]])
  with serving.compilations() as found:
    batch.join([running_lib.Ask(_row(2, 4)[0])])
    batch.step()
    batch.join([running_lib.Ask(_row(3, 5)[0], model_lib.SAMPLING)])
    batch.step()
  assert not found


class _Asked:
  """A scheduler, and requests to it with the tokens that they got."""

  def __init__(self, served, **options):
    self.scheduler = scheduler_lib.Scheduler(served, **options)
    self.tokens = {}
    self.order = []

  def request(self, number, row, mixes=True, then=None, limit=LENGTH):
    self.tokens[number] = []

    def note(token):
      self.tokens[number].append(token.id)
      self.order.append(number)
      if then is not None and len(self.tokens[number]) == 1:
        then()

    return requests_lib.Request(
      row,
      model_lib.GREEDY,
      mixes,
      time.monotonic() + 600,
      limit,
      on_token=note,
    )

  def ask(self, number, row, **options):
    request = self.request(number, row, **options)
    self.scheduler.submit([request])
    return request


def test_a_request_joins_at_the_next_step():
  asked, later = _Asked(_model()), []
  row, other = _row(1, 3)[0], _row(2, 6)[0]
  first = asked.ask(
    0, row, then=lambda: later.append(asked.ask(1, other, limit=2))
  )
  first.future.result(600)
  later[0].future.result(600)
  asked.scheduler.close()
  assert asked.order[:5] == [0, 0, 1, 0, 1]


def test_one_that_cannot_join_waits_for_those_before_it_only():
  asked, later = _Asked(_model(mix_up_to=0.01)), []
  large = _row(1, 3)[0]
  small = functools.partial(_row, share=0.005)

  def more():
    later.append(asked.ask(1, large, mixes=False))
    later.append(asked.ask(2, small(3, 5)[0]))

  first = asked.ask(0, small(2, 6)[0], then=more)
  first.future.result(600)
  for request in later:
    request.future.result(600)
  asked.scheduler.close()
  assert asked.order == [0] * LENGTH + [1] * LENGTH + [2] * LENGTH


def test_after_a_failure_tokens_are_handed_on_once(monkeypatch):
  served = _model()
  rows = [_row(1, 3), _row(None, 8)]
  calls, step = [], steps.step

  def failing(*arguments, **options):
    calls.append(1)
    if len(calls) == 3:
      raise RuntimeError('injected')
    return step(*arguments, **options)

  monkeypatch.setattr(steps, 'step', failing)
  asked = _Asked(served)
  requests = [asked.request(i, row) for i, (row, _) in enumerate(rows)]
  asked.scheduler.submit(requests)
  for i, (request, (row, tuned)) in enumerate(zip(requests, rows, strict=True)):
    answer = request.future.result(600)
    expected, _ = _expected(row, tuned)
    assert answer.tokens[: len(expected)].tolist() == expected.tolist()
    assert asked.tokens[i] == answer.tokens.tolist()
  asked.scheduler.close()
  serving.assert_seed(served, _seed('smollm2')[1])


def test_only_the_request_that_fails_gets_no_answer():
  def refuse():
    raise UserError('it is damaged')

  asked = _Asked(_model())
  good = _row(1, 3)[0]
  bad = good._replace(subset='bad', load=refuse)
  requests = [asked.request(i, row) for i, row in enumerate((good, bad))]
  asked.scheduler.submit(requests)
  assert len(requests[0].future.result(600).tokens) == LENGTH
  with pytest.raises(UserError, match='damaged'):
    requests[1].future.result(600)
  asked.scheduler.close()


def test_one_that_is_stopped_leaves():
  asked, begun = _Asked(_model()), threading.Event()
  request = asked.request(0, _row(1, 3)[0], then=lambda: request.stop())
  asked.scheduler.submit([request])
  request.future.add_done_callback(lambda _: begun.set())
  assert begun.wait(600)
  asked.scheduler.close()
  assert asked.order == [0]


def test_other_networks_have_no_running_batch():
  assert running_lib.make(serving.model(input_length=8), 4) is None


def test_slots_without_rows_cost_no_memory():
  net = _seed('smollm2')[0]
  params = api.shapes(net)
  how = steps.How(net, 64, None, None)
  rows = steps.Rows(
    *np.zeros((3, 1), np.int32),
    *np.ones((2, 1), bool),
    decoding.Sampling().draws(np.zeros(1, np.int32)),
  )

  def scratch(slots):
    cache = jax.eval_shape(lambda p: steps.blank(p, how, slots), params)
    step = steps.step.lower(params, None, cache, rows, how=how).compile()
    return step.memory_analysis().temp_size_in_bytes, cache

  few, _ = scratch(1)
  many, cache = scratch(1024)
  largest = max(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
  assert many < few + largest / 10
