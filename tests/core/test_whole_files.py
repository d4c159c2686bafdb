"""Files appear whole or not at all, whoever else writes them."""

import itertools
import os
import signal
import subprocess
import sys
import textwrap
import threading
import uuid

import pytest

from dst_t5x.core import whole_files


def test_an_older_file_is_replaced(tmp_path):
  path = tmp_path / 'a.json'
  for text in ('ä', 'b'):
    whole_files.write_text(path, text)
    assert path.read_bytes() == text.encode()
  assert os.listdir(tmp_path) == ['a.json']
  # Readable by whom the umask lets read, as any other file.
  (tmp_path / 'other').touch()
  assert path.stat().st_mode == (tmp_path / 'other').stat().st_mode


@pytest.mark.parametrize('make', ['folder', 'missing'])
def test_a_write_that_fails_leaves_nothing(tmp_path, make):
  target = tmp_path / 'x' / 'y'
  if make == 'folder':
    target.mkdir(parents=True)
  with pytest.raises(OSError, match='x'):
    whole_files.write_bytes(target, b'1')
  assert [p for p in tmp_path.rglob('*') if p.is_file()] == []


def test_many_writers_of_one_file(tmp_path):
  """None of them fails, and what is read is what one of them wrote."""
  path = tmp_path / 'a.dst'
  contents = [bytes([i]) * (50_000 + i) for i in range(4)]
  path.write_bytes(contents[0])
  failed, ended = [], threading.Event()

  def write(content):
    try:
      for _ in range(40):
        whole_files.write_bytes(path, content)
    except OSError as e:
      failed.append(e)

  def sweep():
    # Another process that starts: it takes nothing away.
    while not ended.is_set():
      whole_files.sweep(tmp_path)

  threads = [threading.Thread(target=write, args=(c,)) for c in contents]
  sweeper = threading.Thread(target=sweep)
  for thread in (*threads, sweeper):
    thread.start()
  try:
    while any(thread.is_alive() for thread in threads):
      assert path.read_bytes() in contents
  finally:
    ended.set()
    for thread in (*threads, sweeper):
      thread.join()
  assert failed == []
  assert os.listdir(tmp_path) == ['a.dst']


def test_what_a_killed_process_left_is_swept(tmp_path):
  program = textwrap.dedent(f"""
    import os, time
    from dst_t5x.core import whole_files

    def never(_):
      print('writing', flush=True)
      time.sleep(600)

    os.fsync = never
    whole_files.write_bytes({str(tmp_path / 'a')!r}, b'half')
  """)
  process = subprocess.Popen(
    [sys.executable, '-c', program], stdout=subprocess.PIPE
  )
  with process:
    process.stdout.readline()
    (part,) = tmp_path.iterdir()
    whole_files.sweep(tmp_path)
    assert part.exists()  # Its process lives.
    process.send_signal(signal.SIGKILL)
  whole_files.sweep(tmp_path)
  assert list(tmp_path.iterdir()) == []


def test_only_leftovers_are_swept(tmp_path):
  left = tmp_path / f'.{uuid.uuid4().hex}.part'
  others = ['film.part', '.film.part', 'a.dst.part', 'a.dst', '.lock']
  for path in itertools.chain([left], (tmp_path / name for name in others)):
    path.touch()
  whole_files.sweep(tmp_path)
  whole_files.sweep(tmp_path / 'nowhere')
  assert sorted(os.listdir(tmp_path)) == sorted(others)
