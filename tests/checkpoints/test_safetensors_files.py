"""Damaged and forged safetensors files: each gives an error of one line."""

import json
import struct

from etils import epath
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import ml_dtypes
import numpy as np
import pytest
import refusals
import safetensors
from safetensors import numpy as safetensors_numpy

from dst_t5x.checkpoints import safetensors_files
from dst_t5x.core import errors


def _write(path, header, data):
  """Writes a file with the given header, JSON or bytes."""
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  path.write_bytes(struct.pack('<Q', len(text)) + text + data)
  return epath.Path(path)


def _read(path):
  with safetensors_files.opened(path) as opened:
    return {name: opened.tensor(name) for name in opened.names}


def _entry(start, end, shape, dtype='F16'):
  return {'dtype': dtype, 'shape': shape, 'data_offsets': [start, end]}


GOOD = {'a': _entry(0, 4, [2]), 'b': _entry(4, 8, [1, 2])}
DATA = bytes(8)


def _changed(**changes):
  return {**GOOD, 'b': {**GOOD['b'], **changes}}


def _without(key):
  return {'a': GOOD['a'], 'b': {k: v for k, v in GOOD['b'].items() if k != key}}


FORGED = {
  'nothing': b'',
  'list': b'[]',
  'null': b'null',
  'number': b'3',
  'byte order mark': b'\xef\xbb\xbf' + json.dumps(GOOD).encode(),
  'nesting': b'[' * 100_000,
  'overlap': _changed(data_offsets=[2, 6]),
  'same bytes': _changed(data_offsets=[0, 4]),
  'hole': {'a': GOOD['a'], 'b': _entry(6, 8, [1])},
  'backwards': _changed(data_offsets=[8, 4]),
  'beyond': _changed(data_offsets=[4, 10**12]),
  'negative': _changed(data_offsets=[-4, 0]),
  'three offsets': _changed(data_offsets=[4, 8, 8]),
  'texts': _changed(data_offsets=['4', '8']),
  'shape': _changed(shape=[3]),
  'negative shape': _changed(shape=[-1, -2]),
  'absurd shape': _changed(shape=[2**40, 2**40]),
  'shape of texts': _changed(shape=['1', '2']),
  'no list': _changed(shape=2),
  'no type': _without('dtype'),
  'no shape': _without('shape'),
  'no offsets': _without('data_offsets'),
  'type': _changed(dtype='X'),
  'type of a number': _changed(dtype=3),
  'entry': {**GOOD, 'b': [1]},
  'null entry': {**GOOD, 'b': None},
  'metadata list': {**GOOD, '__metadata__': []},
  'metadata number': {**GOOD, '__metadata__': {'a': 1}},
}


@pytest.mark.parametrize('name', FORGED)
def test_what_the_reference_refuses_is_one_line(name, tmp_path):
  file = _write(tmp_path / 'x.safetensors', FORGED[name], DATA)
  with pytest.raises(safetensors.SafetensorError):
    safetensors.deserialize((tmp_path / 'x.safetensors').read_bytes())
  said = refusals.refusal(_read, file)
  assert said.startswith(f'{file} is truncated or damaged, or no safetensors')


@settings(max_examples=300, deadline=None)
@given(
  place=st.integers(0, 10**4),
  bits=st.integers(1, 255),
  length=st.one_of(st.none(), st.integers(0, 10**4)),
)
def test_damaged_files_are_one_line_or_read(
  place, bits, length, tmp_path_factory
):
  arrays = {'a': np.ones(3, np.float32), 'b': np.ones((2, 2), np.float16)}
  blob = bytearray(safetensors_numpy.save(arrays, {'format': 'pt'}))
  blob[place % len(blob)] ^= bits
  file = tmp_path_factory.getbasetemp() / 'damaged.safetensors'
  file.write_bytes(blob[: len(blob) if length is None else length % len(blob)])
  said = refusals.refusal(_read, epath.Path(file))
  assert said is None or 'damaged.safetensors' in said


@pytest.mark.parametrize('name', ['a\nb', '\x1b[31m', '\x00' * 999])
def test_names_that_cannot_be_printed_are_refused(tmp_path, name):
  file = epath.Path(tmp_path / 'x')
  file.write_bytes(safetensors_numpy.save({name: np.ones(1, np.float32)}))
  assert 'has a tensor with the name' in refusals.refusal(_read, file)


def test_types_are_exact_and_arrays_are_ours(tmp_path):
  x = np.linspace(-3, 3, 24).reshape(2, 3, 4)
  arrays = {
    np.dtype(dtype).name: x.astype(dtype)
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16)
  }
  arrays |= {'scalar': np.float32([2.5])[0:1].reshape(()),
             'empty': np.zeros((0, 3), np.float32)}  # fmt: skip
  # An odd number of bytes before the others: they are not aligned.
  data = safetensors_numpy.save(
    {'_': np.ones(1, np.uint8), **arrays}, {'k': 'v'}
  )
  file = epath.Path(tmp_path / 'x')
  file.write_bytes(data)
  with safetensors_files.opened(file) as opened:
    assert opened.metadata == {'k': 'v'}
    found = {name: opened.tensor(name) for name in opened.names - {'_'}}
    with pytest.raises(errors.UserError, match=r'_ of .* is U8, not F32'):
      opened.check('_', (1,), '')
  assert found.keys() == arrays.keys()
  for name, array in arrays.items():
    assert found[name].dtype == array.dtype
    assert found[name].shape == array.shape
    assert found[name].tobytes() == array.tobytes()
    found[name][...] = 0


@pytest.mark.parametrize('kind', ['missing', 'folder'])
def test_what_is_no_file_is_said(kind, tmp_path):
  path = epath.Path(tmp_path / 'x')
  if kind == 'folder':
    path.mkdir()
  said = {'missing': f'{path} is missing', 'folder': f'cannot read {path}: '}
  assert refusals.refusal(_read, path).startswith(said[kind])
