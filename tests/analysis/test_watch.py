"""What is seen of a run while it is trained."""

import json
import os
import pty
import signal
import subprocess
import sys
import time

import analysis_runs
import commands
from etils import epath
import pytest

from dst_t5x.analysis import watch

_ROW = {
  'step': 20,
  'train/loss': 0.5,
  'speed/steps_per_second': 4.0,
  'free/total': 60.0,
  'free/fraction': 0.01,
  'free/churn': 0.125,
  'train/refused_steps': 2.0,
}


def _unfinished(folder):
  """Writes a run that has made 20 of 100 steps; returns its folder."""
  analysis_runs.write(folder, 50.0, epsilon=0.01, steps=100)
  (folder / 'report.json').unlink()
  rows = [
    _ROW | {'step': 10, 'train/loss': 1.0},
    {'step': 10, 'eval/loss': 2.0, 'sort/exact_match': 33.0},
    {'step': 10, 'overlap/first': 0.25, 'overlap/last_saved': 0.75},
    _ROW,
  ]
  text = ''.join(json.dumps(row) + '\n' for row in rows)
  (folder / 'metrics.jsonl').write_text(text + '{"step": 3')
  return folder


def test_everything_is_said(tmp_path):
  folder = _unfinished(tmp_path / 'run')
  now = watch.snapshot(epath.Path(folder))
  assert watch.fields(now) == {
    'step': '20 of 100 (20%)',
    'speed': '4 steps/s',
    'left': '00:20 of training',
    'loss': '0.5',
    'score': 'exact_match 33 at step 10',
    'free': '60 (1.000%)',
    'churn': '12.5% since the report before',
    'overlap': '25.0% of the first saved, 75.0% of the one before, at step 10',
    'refused steps': '2',
  }
  assert watch.verdict(now) == ''
  os.utime(folder / 'metrics.jsonl', (1, time.time() - 1000))
  now = watch.snapshot(epath.Path(folder))
  assert 'is it still running?' in watch.fields(now)['last report']


def test_one_look(tmp_path, capsys):
  folder = _unfinished(tmp_path / 'run')
  assert watch.main([str(folder), '--once']) == 0
  assert capsys.readouterr().out.startswith('step 20 of 100 (20%) | speed 4')
  assert watch.main([str(tmp_path / 'no'), '--once']) == 1
  assert (
    capsys.readouterr().err == f'error: there is no run in {tmp_path}/no yet\n'
  )


def test_a_run_that_has_ended_is_said_to_be(tmp_path, capsys):
  finished = analysis_runs.write(tmp_path / 'run', 50.0, epsilon=0.01)
  assert watch.main([str(finished)]) == 0
  assert capsys.readouterr().out.endswith('\nrun is finished\n')
  failed = _unfinished(tmp_path / 'failed')
  (failed / 'log.txt').write_text('…\nerror: the loss is nan at step 21\n')
  assert watch.main([str(failed)]) == 1
  out = capsys.readouterr().out
  assert out.endswith('\nfailed ended: error: the loss is nan at step 21\n')


def test_a_sweep_and_a_file_are_no_runs(tmp_path, capsys):
  _unfinished(tmp_path / 'sweep' / 'one')
  assert watch.main([str(tmp_path / 'sweep')]) == 1
  message = capsys.readouterr().err
  assert f'name one of them, such as {tmp_path / "sweep" / "one"}' in message
  (tmp_path / 'file').write_text('')
  assert watch.main([str(tmp_path / 'file')]) == 1
  assert 'is a file' in capsys.readouterr().err


def _start(folder, **streams):
  return subprocess.Popen(
    [sys.executable, '-m', 'dst_t5x.analysis.watch', folder, '--every=0.1'],
    env=os.environ | {'PYTHONPATH': str(commands.TESTS.parent)},
    **streams,
  )


def test_into_a_pipe_goes_a_line_a_report_until_the_end(tmp_path):
  folder = tmp_path / 'run'
  process = _start(folder, stdout=subprocess.PIPE, text=True)
  assert process.stdout.readline() == f'waiting for a run in {folder}\n'
  _unfinished(folder)
  line = process.stdout.readline()
  if line.startswith('step 0'):  # It looked before all was written.
    line = process.stdout.readline()
  assert line.startswith('step 20 of 100 (20%) | speed 4 steps/s')
  with (folder / 'metrics.jsonl').open('a') as file:
    file.write('\n' + json.dumps(_ROW | {'step': 30}) + '\n')
  assert process.stdout.readline().startswith('step 30 of 100')
  process.send_signal(signal.SIGINT)
  out, _ = process.communicate(timeout=commands.TIMEOUT)
  assert process.returncode == 130
  assert out == ''


def test_on_a_terminal_the_summary_stays_and_ctrl_c_ends_it(tmp_path):
  pytest.importorskip('rich')
  folder = _unfinished(tmp_path / 'run')
  ours, theirs = pty.openpty()
  process = _start(
    folder, stdout=theirs, stderr=theirs, stdin=subprocess.DEVNULL
  )
  os.close(theirs)
  seen = b''
  while b'00:20 of training' not in seen:
    seen += os.read(ours, 4096)
  process.send_signal(signal.SIGINT)
  try:
    while more := os.read(ours, 4096):
      seen += more
  except OSError:  # How the end of a terminal is told.
    pass
  os.close(ours)
  assert process.wait(commands.TIMEOUT) == 130
  assert b'Traceback' not in seen
  assert '░'.encode() in seen
