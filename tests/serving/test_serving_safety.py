"""After any failure, the seed's bits are intact and answers are right."""

import contextlib
import functools

from hypothesis import HealthCheck
from hypothesis import settings
from hypothesis import stateful
from hypothesis import strategies as st
import jax
import networks
import numpy as np
import pytest
import serving

from dst_t5x import subsets as subset_lib
from dst_t5x.core.errors import UserError
from dst_t5x.serving import batches
from dst_t5x.serving import integrity
from dst_t5x.serving import model as model_lib
from dst_t5x.subsets import on_device

SHARES = (0.01, 0.05, 0.3)
NUMBERS = st.integers(0, 3)


@functools.cache
def _subset(number, share):
  return serving.subset(share, number)


@functools.cache
def _expected(number, share, text):
  """Returns what a dense model says; the seed's for no share."""
  params = serving.seed() if share is None else _subset(number, share)[1]
  return serving.alone(params, serving.tokens(text))


class Injected(Exception):
  """The fault that the tests inject."""


def _faulty(function, when, loses):
  """Returns a function that fails at its `when`-th call, before or after.

  Args:
    function: gives its arguments' memory away, like `_write`.
    when: number of the call.
    loses: whether the parameters are lost by then.
  """
  calls = 0

  def call(*arguments, **options):
    nonlocal calls
    calls += 1
    if calls == when:
      if loses:
        function(*arguments, **options)
      raise Injected
    return function(*arguments, **options)

  return call


class Serving(stateful.RuleBasedStateMachine):
  """Any requests, wrong subsets and failures, one after the other."""

  def __init__(self):
    super().__init__()
    self.model = _model()

  def _check(self, rows):
    answers = self.model.decode([_row(*row) for row in rows])
    for row, answer in zip(rows, answers, strict=True):
      tokens, score = _expected(*row)
      np.testing.assert_array_equal(answer.tokens, tokens)
      assert answer.score == pytest.approx(score, abs=1e-4)

  @stateful.rule(number=NUMBERS, share=st.sampled_from((None, *SHARES)))
  def one(self, number, share):
    self._check([(number, share, 0)])

  @stateful.rule(rows=st.tuples(NUMBERS, NUMBERS, st.sampled_from(SHARES)))
  def two(self, rows):
    self._check([(rows[0], rows[2], 1), (rows[1], rows[2], 2)])

  @stateful.rule(kind=st.sampled_from(('seed', 'place', 'value', 'order')))
  def wrong(self, kind):
    bad = model_lib.Row(serving.tokens(1), 'bad', lambda: _wrong(kind))
    with pytest.raises(UserError):
      self.model.decode([_row(0, 0.05, 1), bad])

  @stateful.rule(
    number=NUMBERS,
    share=st.sampled_from(SHARES),
    when=st.integers(1, 3),
    loses=st.booleans(),
    name=st.sampled_from(('_write', '_read')),
  )
  def fault(self, number, share, when, loses, name):
    function = _faulty(getattr(on_device, name), when, loses)
    with _replaced(name, function), contextlib.suppress(Injected):
      self.model.decode([_row(number, share, 0)])
      self.model.decode([_row(number, None, 0)])

  @stateful.rule()
  def evict(self):
    self.model.placed.clear()

  @stateful.invariant()
  def the_seed_is_intact(self):
    # As `subsets.assert_same`, but many thousands of times.
    found = jax.tree.leaves(self.model.revert())
    for leaf, seed in zip(found, jax.tree.leaves(serving.seed()), strict=True):
      assert np.asarray(leaf).tobytes() == seed.tobytes()

  def teardown(self):
    assert self.model.is_intact()


@functools.cache
def _model():
  """One model for all sequences: what one leaves behind, the next finds."""
  first = serving.model()
  placed = first.layout.place(_subset(0, 0.05)[0], first.revert())
  return serving.model(device_bytes=4 * placed.nbytes, mix_up_to=0.1)


def _row(number, share, text):
  tokens = serving.tokens(text)
  if share is None:
    return model_lib.Row(tokens)
  return model_lib.Row(
    tokens, (number, share), lambda: _subset(number, share)[0]
  )


@functools.cache
def _wrong(kind):
  good = _subset(0, 0.05)[0]
  path = max(good.positions, key=lambda path: len(good.positions[path]))
  positions, values = dict(good.positions), dict(good.values)
  fingerprint = good.fingerprint
  if kind == 'seed':
    fingerprint = 'f' * 64
  elif kind == 'place':
    positions[path] = positions[path] + 10**9
  elif kind == 'value':
    values[path] = np.full_like(values[path], np.nan)
  else:
    positions[path] = positions[path][::-1]
  return subset_lib.Subset(good.tensors, positions, values, fingerprint)


@contextlib.contextmanager
def _replaced(name, function):
  original = getattr(on_device, name)
  setattr(on_device, name, function)
  try:
    yield
  finally:
    setattr(on_device, name, original)


TestSequences = Serving.TestCase
TestSequences.settings = settings(
  max_examples=2000,
  stateful_step_count=4,
  deadline=None,
  suppress_health_check=list(HealthCheck),
  derandomize=True,
)


def test_a_fault_in_decoding_itself(monkeypatch):
  served = serving.model()
  served.decode([_row(1, 0.05, 0)])

  def broken(*_, **__):
    raise Injected

  with monkeypatch.context() as patch:
    patch.setattr(batches, 'decode_alone', broken)
    with pytest.raises(Injected):
      served.decode([_row(2, 0.05, 0)])
  serving.assert_seed(served)
  assert served.counts['restored'] == 0


def test_spoilt_parameters_are_loaded_anew():
  """Bits that flip in memory are found at the next failure, or when asked."""
  served = serving.model()
  served._params = jax.tree.map(lambda leaf: leaf * 1, served._params)
  leaf = served._params['decoder']['logits_dense']['kernel']
  flipped = leaf.at[3, 4].multiply(-1)
  served._params['decoder']['logits_dense']['kernel'] = flipped
  assert not served.is_intact()
  served._repair()
  assert served.is_intact()
  assert served.counts['restored'] == 1
  serving.assert_seed(served)


def test_a_seed_that_cannot_be_loaded_is_tried_again():
  served = serving.model()
  fails = [True]

  def load():
    if fails:
      raise OSError('the disk is away')
    return serving.seed()

  served._load_seed = load
  with (
    _replaced('_write', _faulty(on_device._write, 1, loses=True)),
    pytest.raises(Injected),
  ):
    served.decode([_row(1, 0.05, 0)])
  with pytest.raises(OSError, match='away'):
    served.decode([_row(1, 0.05, 0)])
  fails.clear()
  answer = served.decode([_row(1, 0.05, 0)])[0]
  np.testing.assert_array_equal(answer.tokens, _expected(1, 0.05, 0)[0])
  serving.assert_seed(served)


def test_another_seed_in_its_place_is_refused():
  served = serving.model()
  other = networks.random_params(serving.network(), seed=1)
  served._load_seed = lambda: other
  with (
    _replaced('_write', _faulty(on_device._write, 1, loses=True)),
    pytest.raises(Injected),
  ):
    served.decode([_row(1, 0.05, 0)])
  with pytest.raises(UserError, match='no longer what it was'):
    served.decode([_row(1, 0.05, 0)])


def test_the_checksum_tells_any_change():
  params = serving.model().revert()
  before = np.asarray(integrity.checksum(params))
  random = np.random.default_rng(0)
  kernel = np.asarray(params['decoder']['logits_dense']['kernel'])
  for _ in range(200):
    bits = kernel.view(np.uint32).copy().reshape(-1)
    bits[random.integers(bits.size)] ^= np.uint32(1 << random.integers(32))
    changed = bits.view(np.float32).reshape(kernel.shape)
    tree = {**params, 'decoder': {**params['decoder']}}
    tree['decoder']['logits_dense'] = {'kernel': changed}
    assert (np.asarray(integrity.checksum(tree)) != before).sum() == 1
