"""One reader of text files: what is a line, a text, a row."""

import json

import hypothesis
from hypothesis import strategies as st
import pytest

from dst_t5x.core.errors import UserError
from dst_t5x.data import text_files

_ONE_LINE = st.text(
  st.characters(blacklist_characters='\n', blacklist_categories=['Cs'])
  | st.sampled_from('\r\ufeff\u2028\x0b\x85\x00\t'),
  max_size=8,
)


def _read(tmp_path, content, parse=str):
  path = tmp_path / 'file.txt'
  path.write_bytes(content)
  return list(text_files.read('THE_FILE', path, parse))


@hypothesis.given(
  st.lists(_ONE_LINE.map(lambda text: text.lstrip('\ufeff') + '.'), min_size=1),
  st.sampled_from(['\n', '\r\n']),
  st.booleans(),
  st.sampled_from(['', '\ufeff']),
)
@hypothesis.settings(
  deadline=None,
  suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
def test_texts_are_read_as_they_were_written(tmp_path, texts, end, ended, mark):
  content = end.join(texts) + end * ended
  path = tmp_path / 'file.txt'
  path.write_bytes((mark + content).encode())
  assert list(text_files.read_texts('FILE', path)) == texts


def test_empty_lines_are_texts_and_the_last_end_begins_none(tmp_path):
  assert _read(tmp_path, b'') == []
  assert _read(tmp_path, b'\n\r\na\n') == ['', '', 'a']
  assert _read(tmp_path, b'a\n\n') == ['a', '']
  # A carriage return ends no line by itself.
  assert _read(tmp_path, b'a\rb\n\rc\r\r\nd\r') == ['a\rb', '\rc\r', 'd\r']


def test_files_that_were_joined_have_no_marks_within(tmp_path):
  content = 'a\n'.encode('utf-8-sig') + 'b\ufeff\n'.encode('utf-8-sig')
  assert _read(tmp_path, content) == ['a', 'b\ufeff']


@pytest.mark.parametrize(
  ('content', 'expected'),
  [
    (b'ab\n\xff\n', '^THE_FILE:2 is not UTF-8$'),
    ('Ä\n'.encode('latin-1'), '^THE_FILE:1 is not UTF-8$'),
    ('ab\n'.encode('utf-16'), 'THE_FILE:1 is not UTF-8 but UTF-16'),
    (b'\xed\xa0\x80', 'is not UTF-8'),  # Half a character.
  ],
)
def test_what_is_no_text_is_named_by_line(tmp_path, content, expected):
  with pytest.raises(UserError, match=expected):
    _read(tmp_path, content)


def test_files_that_cannot_be_read(tmp_path):
  for path in (tmp_path / 'none', tmp_path):
    with pytest.raises(UserError, match=r'^cannot read THE_FILE: '):
      list(text_files.read('THE_FILE', path, str))
  with pytest.raises(UserError, match='only gs:// and s3://'):
    list(text_files.read('THE_FILE', 'ftp://x/y', str))


@pytest.mark.parametrize('name', ['a.json', 'a.CSV', 'a.ndjson'])
def test_rows_under_another_name_are_not_read_as_texts(tmp_path, name):
  (tmp_path / name).write_text('{"inputs": "a"}\n')
  with pytest.raises(UserError, match=r'make it \.txt .* or \.jsonl'):
    list(text_files.read_texts(name, tmp_path / name))


_JSON = st.recursive(
  st.none() | st.booleans() | st.integers() | st.text(),
  lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
  max_leaves=5,
)


@hypothesis.given(_JSON)
@hypothesis.settings(max_examples=30, deadline=None)
def test_an_object_is_read_and_nothing_else(value):
  line = json.dumps(value)
  if isinstance(value, dict):
    assert text_files.parse_object(line) == value
  else:
    with pytest.raises(text_files.MalformedRow, match='is not an object'):
      text_files.parse_object(line)


@hypothesis.settings(deadline=None)
@hypothesis.given(st.text(st.sampled_from('{}[]":, a1.e-\\u\r\x00')))
def test_whatever_a_line_holds_it_is_a_row_or_malformed(line):
  try:
    row = text_files.parse_object(line)
  except text_files.MalformedRow:
    return
  assert isinstance(row, dict) or not line.strip()


@pytest.mark.parametrize(
  ('line', 'expected'),
  [
    ('[' * 3000 + ']' * 3000, 'nests too deeply'),
    ('{"a": ' * 3000 + '1' + '}' * 3000, 'nests too deeply'),
    ('[' * 100_000, 'nests too deeply'),
    ('{"a": %s}' % ('1' * 5000), r'cannot be read \(Exceeds the limit'),
    ('{"a": 1, "b": 2, "a": 3}', "has 'a' more than once"),
    ('{"b": [{"a": 1, "a": 1}]}', "has 'a' more than once"),
    ('\ufeff{}', r'is not JSON \(Unexpected UTF-8 BOM'),
    ('{"a": 1} {"b": 2}', r'is not JSON \(Extra data at column 10'),
  ],
)
def test_all_that_python_cannot_parse_is_malformed(line, expected):
  with pytest.raises(text_files.MalformedRow, match=expected):
    text_files.parse_object(line)


def test_texts_of_a_row():
  row = {'one': 'a', 'several': ['a', ''], 'none': None, 'number': ['a', 1]}
  row |= {'empty': [], 'half': '\ud83d'}
  assert text_files.text_of(row, 'one') == 'a'
  assert text_files.texts_of(row, 'one') == ['a']
  assert text_files.texts_of(row, 'several') == ['a', '']
  for name, expected in [
    ('none', 'neither text nor a list'),
    ('empty', 'neither text nor a list'),
    ('number', "has 'number' that is not text"),
    ('half', "half a character in 'half'"),
    ('sevral', "has no 'sevral'; did you mean 'several'"),
  ]:
    with pytest.raises(text_files.MalformedRow, match=expected):
      text_files.texts_of(row, name)
