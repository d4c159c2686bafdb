"""Runs of a sweep on this machine, in a pool of worker processes."""

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

# A process is replaced after this many runs because libraries may leak memory.
# Starting one takes about ten seconds.
_RUNS_PER_PROCESS = 100
_PATIENCE = 60  # Seconds that a run has to end after Ctrl-C.


class WorkerDied(Exception):
  """A worker has ended without an answer; the message says how."""


class Worker:
  """A process that carries out commands in sequence; see `launch.worker`.

  `concurrent.futures` does not replace this: a crash breaks its whole pool, and
  its workers share environment variables and processors.
  """

  def __init__(self, environment: Mapping[str, str], share: set[int]) -> None:
    """Starts the process.

    Args:
      environment: additional environment variables.
      share: the processors that it may use.
    """
    self._process = subprocess.Popen(
      [sys.executable, '-m', 'launch.worker'],
      env=os.environ | dict(environment),
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
      # The sweep receives Ctrl-C and passes it on once.
      start_new_session=True,
    )
    if share and hasattr(os, 'sched_setaffinity'):
      os.sched_setaffinity(self._process.pid, share)

  def wait_until_ready(self) -> None:
    """Waits until the worker has imported what runs need.

    Raises:
      WorkerDied: it has ended.
    """
    self._read()

  def call(self, command: str, **arguments: Any) -> dict[str, Any]:
    """Sends the worker a command and returns the answer.

    Raises:
      WorkerDied: it has ended.
    """
    assert self._process.stdin is not None
    line = json.dumps({'command': command} | arguments)
    # If the worker has ended, reading the answer finds out how.
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
    """Ends the worker; its run ends as after Ctrl-C."""
    assert self._process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
      self._process.stdin.close()

  def close(self) -> None:
    """Ends the worker, at once or after the clean end of its run."""
    assert self._process.stdout is not None
    self.stop()
    try:
      self._process.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
      self._process.kill()
      self._process.wait()
    self._process.stdout.close()


class Pool:
  """Workers that take jobs from one list; a context manager."""

  def __init__(self, parallel: int, environment: Mapping[str, str]) -> None:
    """Starts nothing yet.

    Args:
      parallel: number of workers.
      environment: additional environment variables of the workers.
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
    """Ends all workers; their runs end as after Ctrl-C."""
    self._is_stopping.set()
    with self._lock:
      workers = list(self._workers.values())
    for worker in workers:
      worker.stop()
    for worker in workers:
      worker.close()

  def worker(self, index: int = 0) -> Worker:
    """Returns a worker of the pool; starts it if necessary.

    Raises:
      UserError: it cannot start; stderr has its own message.
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
    """Does all jobs.

    Args:
      jobs: name, and arguments of `worker.train_run`.
      started: called with the name of each job that begins.
      ended: called with the name and the worker's answer. The answer has
        `error` if the process ended.

    Raises:
      UserError: a worker cannot start.
      KeyboardInterrupt: on Ctrl-C, after all runs have ended.
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
    """Gives one worker jobs until there are none left."""
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
  """Divides the processors: two processes that share all are slower."""
  if not hasattr(os, 'sched_getaffinity'):
    return [set() for _ in range(parallel)]
  processors = sorted(os.sched_getaffinity(0))
  if parallel >= len(processors):
    return [{processors[i % len(processors)]} for i in range(parallel)]
  return [set(processors[i::parallel]) for i in range(parallel)]


def _devices(parallel: int) -> list[dict[str, str]]:
  """Divides the GPUs in CUDA_VISIBLE_DEVICES if there are enough."""
  name = 'CUDA_VISIBLE_DEVICES'
  devices = [d for d in os.environ.get(name, '').split(',') if d.strip()]
  if len(devices) < parallel:
    return [{} for _ in range(parallel)]
  return [{name: ','.join(devices[i::parallel])} for i in range(parallel)]
