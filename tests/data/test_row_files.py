"""What is known of a file of rows is of the file as it is now."""

import hashlib
import os
import time

from etils import epath
import pytest
import stores

from dst_t5x.core.errors import UserError
from dst_t5x.data import row_files
from dst_t5x.data import text_files


def _parse(line):
  if line.startswith('bad'):
    raise text_files.MalformedRow('is bad')
  return line or None


def _wait_for_the_clock(path):
  """Waits until a change of a file gets another time, a few ms at most."""
  before, other = path.stat().st_ctime_ns, path.with_name('clock')
  other.touch()
  while other.stat().st_ctime_ns <= before:
    time.sleep(1e-3)
    other.touch()


def test_an_edit_of_the_same_length_within_a_second_is_seen(tmp_path):
  path = tmp_path / 'rows.txt'
  file = row_files.File('TRAIN_FILE', str(path), _parse)
  for content in 'one\ntwo\n', 'two\none\n', '\n\none\n\n', 'one\ntwo\n':
    path.write_text(content)
    os.utime(path, (1, 1))  # As `cp -p` and `rsync -t` leave it.
    assert file.digest() == hashlib.sha256(content.encode()).hexdigest()
    assert file.check() == len(content.split())
    _wait_for_the_clock(path)
  path.write_text('bad\ntwo\n')
  with pytest.raises(UserError, match='1 malformed row: line 1 is bad'):
    file.check()


def test_a_file_that_takes_the_place_of_another_is_seen(tmp_path):
  path, other = tmp_path / 'rows.txt', tmp_path / 'other.txt'
  file = row_files.File('TRAIN_FILE', str(path), _parse)
  path.write_text('a\n')
  other.write_text('b\n')
  before = file.digest()
  other.replace(path)
  assert file.digest() != before


def test_a_file_in_a_store_is_read_again_after_a_change():
  with stores.amazon() as store:
    path = epath.Path(store) / 'rows.txt'
    file = row_files.File('TRAIN_FILE', str(path), _parse)
    for content in b'one\n', b'one\ntwo\n':
      path.write_bytes(content)
      assert file.check() == len(content.split())
      assert file.digest() == hashlib.sha256(content).hexdigest()
