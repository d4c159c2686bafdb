"""A forked command does as a command in a process of its own."""

import os
import signal
import subprocess
import sys

import commands
import forked
import pytest

_WAYS = 'new', 'forked'


def _start(way, module, *arguments):
  """Starts `python -m MODULE`, in one of the two ways."""
  variables = forked.environment(HOME=f'/{way}')
  if way == 'forked':
    return forked.Process(module, list(map(str, arguments)), variables)
  return subprocess.Popen(
    [sys.executable, '-m', module, *map(str, arguments)],
    env=variables,
    stdin=subprocess.DEVNULL,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


@pytest.mark.parametrize(
  ('arguments', 'status'),
  [
    (['dst_t5x.analysis.watch', '--help'], 0),
    (['dst_t5x.analysis.watch', __file__], 1),
    (['dst_t5x.analysis.watch', '--evry=1'], 2),
    (['site'], 0),  # Prints the current folder, the path and $HOME.
  ],
)
def test_it_says_the_same_and_ends_in_the_same_way(
  tmp_path, monkeypatch, arguments, status
):
  monkeypatch.chdir(tmp_path)
  ways = [commands.finish(_start(way, *arguments)) for way in _WAYS]
  new, ours = (
    [status, *(text.replace(f'/{way}', '') for text in texts)]
    for way, (status, *texts) in zip(_WAYS, ways, strict=True)
  )
  assert ours == new
  assert ours[0] == status


def test_a_traceback_is_that_of_the_command(tmp_path, monkeypatch):
  (tmp_path / 'failing.py').write_text("""
import atexit
print('at work')
atexit.register(print, 'at exit')
raise ValueError('mine')
""")
  monkeypatch.chdir(tmp_path)
  for way in _WAYS:
    status, out, err = commands.finish(_start(way, 'failing'))
    assert status == 1
    assert out == 'at work\nat exit\n'
    assert err.splitlines()[-3:] == [
      f'  File "{tmp_path}/failing.py", line 5, in <module>',
      "    raise ValueError('mine')",
      'ValueError: mine',
    ]


@pytest.mark.parametrize(
  ('number', 'status'),
  [
    (signal.SIGINT, 130),
    (signal.SIGTERM, -signal.SIGTERM),
    (signal.SIGKILL, -signal.SIGKILL),
  ],
)
def test_signals_reach_it(tmp_path, number, status):
  ends = []
  for way in _WAYS:
    process = _start(way, 'dst_t5x.analysis.watch', tmp_path / 'run')
    assert process.stdout.readline().startswith('waiting for a run in ')
    assert process.poll() is None
    process.send_signal(number)
    ends.append(commands.finish(process))
    assert process.poll() == process.wait() == status
    with pytest.raises(ProcessLookupError):
      os.kill(process.pid, 0)
  assert ends[0] == ends[1] == (status, '', '')


def test_to_wait_has_a_limit(tmp_path):
  process = _start('forked', 'dst_t5x.analysis.watch', tmp_path / 'run')
  assert process.stdout.readline().startswith('waiting')
  with pytest.raises(subprocess.TimeoutExpired):
    process.wait(0.1)
  with pytest.raises(subprocess.TimeoutExpired):
    process.communicate(timeout=0.1)
  process.kill()
  assert process.communicate() == ('', '')


@pytest.mark.parametrize(
  'name',
  [
    *('DST_DATA_DIR', 'JAX_ENABLE_X64', 'PYTHONPATH', 'SACREBLEU'),
    *('TFDS_DATA_DIR', 'XLA_FLAGS'),
  ],
)
def test_what_is_read_only_once_asks_for_a_new_process(name):
  assert forked.can_run_with(forked.environment(NUM_PROCESSES='2'))
  assert not forked.can_run_with(forked.environment(**{name: '/else'}))


def test_what_tensorflow_sets_does_not_ask_for_a_new_process(monkeypatch):
  """Whether it was imported here before or after the server was started."""
  monkeypatch.setenv('TF2_BEHAVIOR', '1')
  assert forked.can_run_with(forked.environment())
  monkeypatch.delenv('TF2_BEHAVIOR')
  assert forked.can_run_with(forked.environment())
