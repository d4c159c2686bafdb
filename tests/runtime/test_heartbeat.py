"""Processes that notice the end of another one, at a cost that stays small."""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time

HOST = socket.gethostname()
_COUNT = 4
_TIMEOUT = 60  # Seconds; some ten times what an idle machine takes.
_WORK = """
import json, sys, time
from dst_t5x.runtime import processes

class Counting:
  # Forwards to JAX's client; counts the keys that are read.
  def __init__(self, client):
    self.client, self.keys, self.calls = client, 0, 0
  def __getattr__(self, name):
    return getattr(self.client, name)
  def key_value_dir_get(self, folder):
    found = self.client.key_value_dir_get(folder)
    self.keys += len(found)
    self.calls += 1
    return found

processes._BEAT, processes._TIMEOUT = 0.05, 2.0
with processes.joined():
  for i in range(20):
    assert processes.gather(str(i)) == [str(i)] * 4
  watch = processes._watch
  watch._client = counting = Counting(processes._client())
  SCRIPT
"""


def _start(script, repository):
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    port = s.getsockname()[1]
  work = _WORK.replace('SCRIPT', textwrap.indent(script, '  ').strip())
  return [
    subprocess.Popen(
      [sys.executable, '-c', work],
      env=os.environ
      | {
        'COORDINATOR_ADDRESS': f'127.0.0.1:{port}',
        'NUM_PROCESSES': str(_COUNT),
        'PROCESS_ID': str(process),
        'JAX_PLATFORMS': 'cpu',
        'PYTHONPATH': str(repository),
      },
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for process in range(_COUNT)
  ]


def _finish(processes):
  try:
    outputs = [process.communicate(timeout=_TIMEOUT) for process in processes]
  finally:
    for process in processes:
      process.kill()
  return [process.returncode for process in processes], outputs


def test_a_heartbeat_reads_one_key(repository):
  script = """
time.sleep(1)
rounds = len(counting.client.key_value_dir_get('dst_t5x/gathered'))
alive = len(counting.client.key_value_dir_get('dst_t5x/alive'))
print(json.dumps([counting.keys, counting.calls, rounds, alive]))
"""
  statuses, outputs = _finish(_start(script, repository))
  assert statuses == [0] * _COUNT, outputs
  for out, _ in outputs:
    keys, calls, rounds, alive = json.loads(out.splitlines()[-1])
    # A heartbeat reads what has failed, nothing here, and one neighbour.
    assert calls >= 10
    assert keys <= calls / 2 + 1
    # Texts of earlier rounds are deleted; a heartbeat overwrites the last.
    assert rounds <= 2 * _COUNT
    assert alive == _COUNT


def test_a_killed_process_ends_all_others(repository):
  script = """
print('ready', flush=True)
time.sleep(1000)
"""
  processes = _start(script, repository)
  for process in processes:
    while process.stdout.readline().strip() != 'ready':
      assert process.poll() is None, process.communicate()
  start = time.monotonic()
  processes[2].kill()
  statuses, outputs = _finish(processes)
  assert time.monotonic() - start < 20
  assert statuses == [1, 1, -signal.SIGKILL, 1], outputs
  for process in (0, 1, 3):
    last = outputs[process][1].splitlines()[-1]
    assert last.startswith(f'error: process 2 ({HOST}) has not been heard of')
