"""Damaged and forged subset files: each is refused, none does any harm.

Each file is also given to the reader for PyTorch, in a process without JAX,
which has to say the same.
"""

import collections
import contextlib
import hashlib
import importlib.util
import json
import time
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import reference
import safetensors.numpy
import subsets
import torch_alone

from dst_t5x import subsets as subset
from dst_t5x.core import errors
from dst_t5x.subsets import content
from dst_t5x.subsets import file as file_lib
from dst_t5x.subsets import fingerprint

_SEED = subsets.seed_tree()
_FINGERPRINT = fingerprint.fingerprint(_SEED)
_ABOUT = {'seed': {'fingerprint': _FINGERPRINT}, 'epsilon': 0.1, 'step': 7}


_readers = {}


@pytest.fixture(scope='module', autouse=True)
def _beside_torch_alone(tmp_path_factory):
  if importlib.util.find_spec('torch') is None:
    yield
    return
  folder = tmp_path_factory.mktemp('alone')
  np.savez(folder / 'seed.npz', **reference.flatten(_SEED))
  (folder / 'packages').mkdir()
  packages = torch_alone.environment(folder / 'packages')
  _readers['torch'] = torch_alone.Reader(packages, folder / 'seed.npz')
  yield
  most_bytes = _readers.pop('torch').close()
  assert most_bytes < 80 * 2**20


def _check_the_other(blob, read=None, applied=None):
  """The reader for PyTorch says the same; None for nothing."""
  assert '\n' not in (read or applied or '')
  if 'torch' in _readers:
    assert _readers['torch'].verdict(blob) == [read, applied]


def _good(dtype=np.float32):
  seed = subsets.seed_tree(dtype)
  found = subset.extract(subsets.tuned_tree(seed), seed)
  return subset.to_bytes(found, _ABOUT)


def _refused(blob):
  """Returns why a file is refused as such; fails if it is not."""
  with pytest.raises(errors.UserError) as error:
    subset.from_bytes(blob)
  assert '\n' not in str(error.value)
  _check_the_other(blob, str(error.value))
  return str(error.value)


def _not_applied(blob):
  """Fails if a file is neither refused nor refused for this seed."""
  try:
    found, _ = subset.from_bytes(blob)
  except errors.UserError as error:
    _check_the_other(blob, str(error))
    return
  with pytest.raises(errors.UserError) as error:
    subset.apply(found, _SEED, _FINGERPRINT)
  said = str(error.value)
  assert '\n' not in said
  _check_the_other(blob, None, said.replace('the seed', 'the model'))


def _signed(blob):
  """Returns a file with the right checksum of whatever it is."""
  return blob[:-32] + hashlib.sha256(blob[:-32]).digest()


def _with_header(blob, change):
  """Returns a file with another header and the right checksum."""
  length = int.from_bytes(blob[:8], 'little')
  header = json.loads(blob[8 : 8 + length])
  text = change(header)
  text = json.dumps(header) if text is None else text
  text = text.encode() + b' ' * (-len(text.encode()) % 8)
  return _signed(len(text).to_bytes(8, 'little') + text + blob[8 + length :])


def _with_arrays(blob, **changed):
  """Returns a file of other arrays, well formed and with its checksum."""
  arrays = safetensors.numpy.load(blob)
  return file_lib.pack({n: arrays[n] for n in content.NAMES} | changed,
                       _ABOUT)  # fmt: skip


@contextlib.contextmanager
def _harmless(most_bytes, most_seconds):
  """Fails if something allocates or takes too much."""
  start = time.process_time()
  tracemalloc.start()
  try:
    yield
    _, peak = tracemalloc.get_traced_memory()
  finally:
    tracemalloc.stop()
  assert peak < most_bytes
  assert time.process_time() - start < most_seconds


def test_a_good_file_is_applied():
  blob = subset.to_bytes(subset.extract(_SEED, _SEED), _ABOUT)
  subset.apply(subset.from_bytes(blob)[0], _SEED)
  _check_the_other(blob)
  _check_the_other(_good(), None)


def test_ten_thousand_damaged_files():
  random = np.random.default_rng(0)
  reasons = collections.Counter()
  for blob in (_good(), _good(ml_dtypes.bfloat16)):
    for length in range(len(blob)):
      reasons['cut', _refused(blob[:length])] += 1
    for place in range(len(blob)):
      for bit in range(8):
        flipped = bytearray(blob)
        flipped[place] ^= 1 << bit
        reasons['flipped', _refused(bytes(flipped))] += 1
  for _ in range(3000):
    damaged = bytearray(blob)
    start, length = random.integers(len(blob)), random.integers(1, 64)
    noise = random.bytes(len(damaged[start : start + length]))
    if damaged[start : start + length] == noise:
      continue
    damaged[start : start + length] = noise
    reasons['noise', _refused(bytes(damaged))] += 1
  for length in range(1, 300):
    reasons['longer', _refused(blob + random.bytes(length))] += 1
  counts = collections.Counter()
  for (kind, _), count in reasons.items():
    counts[kind] += count
  print(*reasons.items(), dict(counts), sep='\n')
  assert counts.total() >= 10_000


def _forged_headers():
  def entry(name, **fields):
    return lambda header: header[name].update(fields)

  def about(**fields):
    def change(header):
      said = json.loads(header['__metadata__']['about']) | fields
      header['__metadata__']['about'] = json.dumps(said)

    return change

  huge = [2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**64, 10**30]
  for name in (*content.NAMES, 'sha256'):
    for number in [-1, 0, 1, 7, 10**4, *huge]:
      yield entry(name, data_offsets=[0, number])
      yield entry(name, data_offsets=[number, number])
      yield entry(name, data_offsets=[number, 0])
      yield entry(name, shape=[number])
      yield entry(name, shape=[number, 1])
      yield entry(name, shape=[number, number])
    yield entry(name, shape=[])
    yield entry(name, shape=[1] * 1000)
    yield entry(name, data_offsets=[])
    yield entry(name, dtype='F32')
    yield entry(name, dtype='I8')
    yield entry(name, dtype='X')
    yield lambda header, name=name: header.pop(name) and None
    for odd in (None, [], {}, 'U8', 3):
      yield lambda header, name=name, odd=odd: header.update({name: odd})
  yield lambda header: header.update(
    values=header['quotients'], quotients=header['values']
  )
  yield lambda header: header.update(
    more={'dtype': 'U8', 'shape': [0], 'data_offsets': [0, 0]}
  )
  for odd in (None, [], 3, 'a', {}, {'format': 'pt'}, {'about': '{}'}):
    yield lambda header, odd=odd: header.update(__metadata__=odd)
  for odd in ('x', 'dst_t5x.subset', 'dst_t5x.subset/2', '', 7, None):
    yield lambda header, odd=odd: header['__metadata__'].update(format=odd)
  for odd in ('', '[]', 'null', '3', '{}', '{', '[' * 10**5, 7, None):
    yield lambda header, odd=odd: header['__metadata__'].update(about=odd)
  for odd in (None, 3, [], {}, 'a', {'fingerprint': 3},
              {'fingerprint': 'a' * 63}, {'fingerprint': 'A' * 64},
              {'fingerprint': ['a' * 64]}):  # fmt: skip
    yield about(seed=odd)
  for text in ('', 'null', '[]', '3', '{', '{}', '[' * 10**5, '{"a":' * 10**4):
    yield lambda header, text=text: text


def test_forged_headers():
  blob = _good()
  count = 0
  with _harmless(most_bytes=20 * 2**20, most_seconds=20):
    for change in _forged_headers():
      _refused(_with_header(blob, change))
      count += 1
    for length in [0, 1, 7, 2**20, 2**20 + 1, 2**31, 2**63, 2**64 - 1]:
      _refused(_signed(length.to_bytes(8, 'little') + blob[8:]))
      count += 1
  assert count > 350


def _tables(text):
  """Yields forged tables."""
  line = 'logits float32 2,3,4\n'
  assert line in text
  for forged in (
    '',
    line,
    line + line,
    'logits float32 2,3,5\n',
    'logits float32 2,3\n',
    'logits float64 2,3,4\n',
    'logits float8 2,3,4\n',
    'logits float32\n',
    'logits\n',
    'logits float32 2,3,-4\n',
    'logits float32 2,3,+4\n',
    'logits float32 2,3,4_0\n',
    'logits float32 2,3,04\n',
    'logits float32 2,3,٤\n',
    'logits float32 2,,4\n',
    'logits float32 2,3,4,\n',
    'logits float32 2.0,3,4\n',
    f'logits float32 {10**14}\n',
    f'logits float32 {10**15}\n',
    f'logits float32 {"9" * 5000}\n',
    f'logits float32 {",".join(["999999999999999"] * 32)}\n',
    f'logits float32 {",".join(["1"] * 10**5)}\n',
    'a/layers/b float32 999999999999999\n',
    'a/layers/b float32 100001\n',
    'a/layers/b float32 999999999999999,0\n',
    'scale float32 2\nscale/layers/a float32 2\nscale/layers_0/a float32 \n',
    'log\x1bits float32 2,3,4\n',
    ' float32 2,3,4\n',
    '\n',
  ):
    if forged != line:
      yield text.replace(line, forged)
  yield text[:-1]
  yield text + '\n'
  yield text + 'scale float32 \n'
  yield ''
  # More than the file's components, which the codes then do not fit.
  yield text + f'z float32 {2**47}\n'
  yield text + f'z float32 {2**48}\n'


def test_forged_tables():
  blob = _good()
  table = safetensors.numpy.load(blob)['tensors'].tobytes().decode()
  with _harmless(most_bytes=80 * 2**20, most_seconds=10):
    for text in _tables(table):
      forged = np.frombuffer(text.encode(), np.uint8)
      _not_applied(_with_arrays(blob, tensors=forged))
    for raw in (b'\xff', table.encode()[:-1] + b'\xc3\n'):
      _refused(_with_arrays(blob, tensors=np.frombuffer(raw, np.uint8)))


@pytest.mark.parametrize('dtype', [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(dtype, value):
  blob = _good(dtype)
  values = safetensors.numpy.load(blob)['values'].view(dtype).copy()
  for place in range(len(values)):
    forged = values.copy()
    forged[place] = value
    reason = _refused(_with_arrays(blob, values=forged.view(np.uint8)))
    assert 'not finite' in reason


def test_forged_positions_and_values():
  blob = _good()
  arrays = safetensors.numpy.load(blob)
  quotients, remainders, values = (
    arrays[n] for n in ('quotients', 'remainders', 'values')
  )
  zeros = np.zeros
  with _harmless(most_bytes=2**20, most_seconds=10):
    for forged in (
      {'values': values[:-4]},
      {'values': values[:-1]},
      {'values': np.append(values, values[:4])},
      {'values': values[:0]},
      {'quotients': quotients[:-1]},
      {'quotients': quotients[:0]},
      {'quotients': np.append(quotients, np.uint8(0))},
      {'quotients': np.append(quotients, np.uint8(1))},
      {'quotients': np.append(np.uint8([0]), quotients)},
      {'quotients': np.append(zeros(5000, np.uint8), quotients)},
      {'quotients': ~quotients},
      {'remainders': remainders[:-1]},
      {'remainders': remainders[:, :-1]},
      {'remainders': remainders.reshape(-1)},
      {'remainders': np.append(remainders, remainders[:1], axis=0)},
      {'remainders': ~remainders},
      {'remainders': zeros((0, 0), np.uint8)},
      {'quotients': zeros(0, np.uint8), 'remainders': zeros((0, 0), np.uint8)},
    ):
      _refused(_with_arrays(blob, **forged))


def test_little_is_allocated_for_many_positions():
  # A byte of quotients may claim eight positions, each of 64 bits here.
  blob, million = _good(), 10**6
  with _harmless(most_bytes=16 * million, most_seconds=5):
    for quotients in (
      np.full(million, 255, np.uint8),
      np.zeros(million, np.uint8),
      np.append(np.zeros(million, np.uint8), np.uint8(1)),
    ):
      _refused(_with_arrays(blob, quotients=quotients))


def test_any_file_that_is_accepted_is_a_subset():
  # With a checksum that fits, any change may happen to be a file.
  random = np.random.default_rng(1)
  blob = _good()
  accepted = refused = 0
  for _ in range(4000):
    damaged = bytearray(blob)
    for place in random.integers(len(blob) - 32, size=random.integers(1, 4)):
      damaged[place] = random.integers(256)
    signed = _signed(bytes(damaged))
    try:
      found, about = subset.from_bytes(signed)
    except errors.UserError as error:
      _check_the_other(signed, str(error))
      refused += 1
      continue
    accepted += 1
    if 'torch' in _readers:
      assert _readers['torch'].verdict(signed)[0] is None
    assert len(about['seed']['fingerprint']) == 64
    assert all(np.isfinite(v).all() for v in found.values.values())
    for path, positions in found.positions.items():
      assert (np.diff(positions) > 0).all()
      assert 0 <= positions[0] <= positions[-1] < found.tensors[path].size
    # It would be applied only to the seed of which it says that it is.
    with pytest.raises(errors.UserError):
      subset.apply(found, _SEED, 'b' * 64)
  assert accepted > 100
  assert refused > 1000


def test_files_that_are_something_else(tmp_path):
  dense = safetensors.numpy.save({'w': np.zeros(9, np.float32)})
  old = safetensors.numpy.save(
    {'values': np.zeros(1, np.float32)},
    {'subset': json.dumps({'format': 'dst_t5x.subset/0', 'about': {}})},
  )
  cases = {
    'missing': (None, 'cannot read the subset file'),
    'empty': (b'', 'it is no subset file'),
    'text': (b'These are ten words of text, not a subset file.', 'no subset'),
    'zeros': (bytes(100), 'it is no subset file'),
    'dense': (dense, 'it is no subset file'),
    'old': (old, "it is of version '0', this program reads 1"),
    'cut': (_good()[:-100], 'damaged or cut short: its checksum is wrong'),
  }
  for name, (blob, message) in cases.items():
    path = tmp_path / name
    if blob is not None:
      path.write_bytes(blob)
    with pytest.raises(errors.UserError) as error:
      subset.load(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)
    assert '\n' not in str(error.value)
  with pytest.raises(errors.UserError, match='cannot read the subset file'):
    subset.load(tmp_path)


def test_a_large_model_is_not_read_only_to_be_refused(tmp_path):
  path = tmp_path / 'model.safetensors'
  header = safetensors.numpy.save({'w': np.zeros(9, np.float32)})
  with path.open('wb') as f:
    f.write(header)
    f.truncate(2**33)  # 8 GiB, on the disk a few bytes.
  with (
    _harmless(most_bytes=2**20, most_seconds=2),
    pytest.raises(errors.UserError, match='no subset file'),
  ):
    subset.load(path)
