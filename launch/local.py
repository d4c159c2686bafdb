"""Runs of a sweep on this machine: some processes take them one by one."""

from collections.abc import Callable, Mapping, Sequence
import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from typing import Any

from dst_t5x.core.errors import UserError

# Libraries may leak: a process is replaced after so many runs. Starting one
# takes some ten seconds.
_RUNS_PER_PROCESS = 100
_PATIENCE = 60  # Seconds that a run gets to end after Ctrl-C.


class WorkerDied(Exception):
  """A worker ended without an answer: how."""


class Worker:
  """A process that does one thing after another; see `launch.worker`."""

  def __init__(self, environment: Mapping[str, str], share: set[int]) -> None:
    """Starts it.

    Args:
      environment: variables of its own.
      share: the processors that it may use.
    """
    self._process = subprocess.Popen(
      [sys.executable, '-m', 'launch.worker'],
      env=os.environ | dict(environment),
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
      # Ctrl-C reaches it through us, once.
      start_new_session=True,
    )
    if share and hasattr(os, 'sched_setaffinity'):
      os.sched_setaffinity(self._process.pid, share)

  def wait_until_ready(self) -> None:
    """Waits until it has imported what runs need.

    Raises:
      WorkerDied: it could not.
    """
    self._read()

  def call(self, command: str, **arguments: Any) -> dict[str, Any]:
    """Has it do something, and returns its answer.

    Raises:
      WorkerDied: it ended meanwhile.
    """
    assert self._process.stdin is not None
    line = json.dumps({'command': command} | arguments)
    # How it ended, if it has, is found out next.
    with contextlib.suppress(BrokenPipeError, ValueError):
      self._process.stdin.write(line + '\n')
      self._process.stdin.flush()
    return self._read()

  def _read(self) -> dict[str, Any]:
    assert self._process.stdout is not None
    line = self._process.stdout.readline()
    if line:
      return json.loads(line)
    status = self._process.wait()
    if status >= 0:
      raise WorkerDied(f'the process ended with exit status {status}')
    name = signal.Signals(-status).name
    hint = ': out of memory?' if -status == signal.SIGKILL else ''
    raise WorkerDied(f'the process was ended by {name}{hint}')

  def stop(self) -> None:
    """Has it end soon: its run, if any, ends as it does with Ctrl-C."""
    assert self._process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
      self._process.stdin.close()

  def close(self) -> None:
    """Ends it: at once if it is idle, after its run's clean end if not."""
    assert self._process.stdout is not None
    self.stop()
    try:
      self._process.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
      self._process.kill()
      self._process.wait()
    self._process.stdout.close()


class Pool:
  """Workers that take jobs from one list; a context manager that ends them."""

  def __init__(self, parallel: int, environment: Mapping[str, str]) -> None:
    """Starts nothing yet.

    Args:
      parallel: how many workers there shall be.
      environment: variables of theirs.
    """
    self._environment = dict(environment)
    self._shares = _shares(parallel)
    self._devices = _devices(parallel)
    self._workers: dict[int, Worker] = {}
    self._is_stopping = threading.Event()
    self._lock = threading.Lock()

  def __enter__(self) -> 'Pool':
    return self

  def __exit__(self, *_: Any) -> None:
    self.stop()

  def stop(self) -> None:
    """Ends all workers; their runs end as they do with Ctrl-C."""
    self._is_stopping.set()
    with self._lock:
      workers = list(self._workers.values())
    for worker in workers:
      worker.stop()
    for worker in workers:
      worker.close()

  def worker(self, index: int = 0) -> Worker:
    """Returns a worker of the pool, started if need be.

    Raises:
      UserError: it cannot start; what it says of that went to stderr.
    """
    with self._lock:
      if self._is_stopping.is_set():
        raise WorkerDied('the sweep is stopping')
      if index in self._workers:
        return self._workers[index]
      worker = Worker(
        self._environment | self._devices[index], self._shares[index]
      )
      self._workers[index] = worker
    try:
      worker.wait_until_ready()
    except WorkerDied as e:
      if self._is_stopping.is_set():
        raise
      raise UserError(f'training cannot start: {e}') from None
    return worker

  def run(
    self,
    jobs: Sequence[tuple[str, dict[str, Any]]],
    started: Callable[[str], None],
    ended: Callable[[str, dict[str, Any]], None],
  ) -> None:
    """Has all jobs done.

    Args:
      jobs: name, and arguments of `worker.train_run`.
      started: is told the name of each job that begins.
      ended: is told the name, and the answer of the worker; `error` says how
        the process ended, if it did.

    Raises:
      UserError: a worker cannot start.
      KeyboardInterrupt: and all runs have ended.
    """
    todo: queue.SimpleQueue[tuple[str, dict[str, Any]]] = queue.SimpleQueue()
    for job in jobs:
      todo.put(job)
    failures: list[BaseException] = []

    def serve(index: int) -> None:
      try:
        self._serve(index, todo, started, ended)
      except WorkerDied:
        pass  # The sweep is stopping.
      except BaseException as e:
        failures.append(e)

    threads = [
      threading.Thread(target=serve, args=(index,), daemon=True)
      for index in range(min(len(self._shares), len(jobs)))
    ]
    for thread in threads:
      thread.start()
    try:
      for thread in threads:
        thread.join()
    except KeyboardInterrupt:
      self.stop()
      for thread in threads:
        thread.join()
      raise
    if failures:
      raise failures[0]

  def _serve(
    self,
    index: int,
    todo: 'queue.SimpleQueue[tuple[str, dict[str, Any]]]',
    started: Callable[[str], None],
    ended: Callable[[str, dict[str, Any]], None],
  ) -> None:
    """Lets one worker take jobs until there are none."""
    runs = 0
    while not self._is_stopping.is_set():
      try:
        name, arguments = todo.get_nowait()
      except queue.Empty:
        return
      worker = self.worker(index)
      started(name)
      try:
        answer = worker.call('train', **arguments)
        is_dead = False
      except WorkerDied as e:
        answer, is_dead = {'error': str(e), 'died': True}, True
      if not self._is_stopping.is_set() or not answer.get('died'):
        ended(name, answer)
      runs += 1
      if (is_dead or runs % _RUNS_PER_PROCESS == 0) and (
        not self._is_stopping.is_set()
      ):
        with self._lock:
          self._workers.pop(index).close()


def _shares(parallel: int) -> list[set[int]]:
  """Divides the processors: two that share all are slower than each alone."""
  if not hasattr(os, 'sched_getaffinity'):
    return [set() for _ in range(parallel)]
  processors = sorted(os.sched_getaffinity(0))
  if parallel >= len(processors):
    return [{processors[i % len(processors)]} for i in range(parallel)]
  return [set(processors[i::parallel]) for i in range(parallel)]


def _devices(parallel: int) -> list[dict[str, str]]:
  """Divides the GPUs that CUDA_VISIBLE_DEVICES names, if it names enough."""
  name = 'CUDA_VISIBLE_DEVICES'
  devices = [d for d in os.environ.get(name, '').split(',') if d.strip()]
  if len(devices) < parallel:
    return [{} for _ in range(parallel)]
  return [{name: ','.join(devices[i::parallel])} for i in range(parallel)]
