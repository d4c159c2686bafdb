"""Several processes that start, work and end together.

`joined` connects the processes of a group (see `environment`) through JAX and
ends them together: when one process ends, all end, and each prints which
process ended first and why. A process that disappears (killed, or its network
failed) is noticed within about 30 seconds.

Processes exchange texts through the key-value store of JAX's coordination
service, which runs in process 0. Accelerators take part in `gather_bytes` only.
With one process, all functions return at once.

JAX's own heartbeat does not replace the one here. When a process misses it, JAX
0.10 aborts the other processes (SIGABRT, status 134) with a stack trace that
names neither the host nor a remedy, before Python can flush its files or print
a line; `jax.distributed.initialize` takes no callback. It is kept as a last
resort, with a longer timeout.
"""

from collections.abc import Iterator
import contextlib
import itertools
import json
import os
import socket
import sys
import threading
import time
import traceback
from typing import Any, NoReturn

from absl import logging
import jax
from jax._src import distributed  # The key-value store has no public name.
from jax.experimental import multihost_utils
import numpy as np

from dst_t5x.core.errors import UserError, first_line
from dst_t5x.runtime import environment
from dst_t5x.runtime import preemption

_BEAT = 1.0  # Seconds between two heartbeats.
_TIMEOUT = 30.0  # Seconds without a heartbeat after which a process is lost.
_TIMEOUT_AFTER_ERROR = 6.0  # The same, once this process has met an error.
_JAX_TIMEOUT = 50  # Seconds; JAX's own heartbeat then aborts the process.
_LINGER = 5.0  # Seconds that the other processes have to read the reason.
_CHUNK = 16 * 2**20  # Bytes that each process sends at once.
_DAY = 24 * 3600 * 1000  # Milliseconds; a lost process is noticed earlier.

# Folders of the key-value store.
_GATHERED = 'dst_t5x/gathered'  # ROUND/PROCESS: a text of `gather`.
_ALIVE = 'dst_t5x/alive'  # PROCESS/beat: a number that grows.
_FAILED = 'dst_t5x/failed'  # PROCESS: why it ended, as JSON.
_ENDED = 'dst_t5x/ended'  # PROCESS: it has read why all end.

_rounds = itertools.count()
_watch: '_Watch | None' = None


def is_first() -> bool:
  """Returns whether this process writes files and reports."""
  return jax.process_index() == 0


def name(process: int | None = None) -> str:
  """Returns the name of a process, by default this one, for messages."""
  process = jax.process_index() if process is None else process
  host = _watch.hosts.get(process) if _watch else None
  return f'process {process} ({host})' if host else f'process {process}'


def gather(text: str) -> list[str]:
  """Returns the text of each process; all processes have to call this."""
  if jax.process_count() == 1:
    return [text]
  client, this_round = _client(), next(_rounds)
  folder = f'{_GATHERED}/{this_round}'
  client.key_value_set(f'{folder}/{jax.process_index()}', text)
  client.wait_at_barrier(folder, _DAY)
  text_of = {
    int(key.rpartition('/')[2]): value
    for key, value in client.key_value_dir_get(folder)
  }
  if is_first() and this_round:
    # All processes are in this round, so all have read the round before it.
    client.key_value_delete(f'{_GATHERED}/{this_round - 1}')
  return [text_of[process] for process in range(jax.process_count())]


def wait_for_all() -> None:
  """Returns when all processes have called this."""
  gather('')


def agree(what: str, value: Any) -> None:
  """Checks that all processes have the same value.

  Args:
    what: name of the value, for the message.
    value: JSON.

  Raises:
    UserError: a process has another value; the message names it.
  """
  texts = gather(json.dumps(value, sort_keys=True))
  for i, text in enumerate(texts):
    if text != texts[0]:
      raise UserError(
        f'{what} is {text} in {name(i)}, and {texts[0]} in {name(0)}'
      )


def gather_bytes(content: bytes) -> list[bytes]:
  """Returns the bytes of each process; all processes have to call this.

  The bytes go over the network of the accelerators, 16 MiB at a time.
  """
  if jax.process_count() == 1:
    return [content]
  sizes = [int(size) for size in gather(str(len(content)))]
  parts: list[list[np.ndarray]] = [[] for _ in sizes]
  for start in range(0, max(sizes), _CHUNK):
    length = min(_CHUNK, max(sizes) - start)
    mine = np.zeros(length, np.uint8)
    here = np.frombuffer(content[start : start + length], np.uint8)
    mine[: len(here)] = here
    of_all = np.asarray(multihost_utils.process_allgather(mine))
    for part, chunk in zip(parts, of_all, strict=True):
      part.append(chunk)
  return [
    b''.join(chunk.tobytes() for chunk in part)[:size]
    for part, size in zip(parts, sizes, strict=True)
  ]


@contextlib.contextmanager
def joined() -> Iterator[None]:
  """Works together with the other processes of the group, if there is one.

  An exception inside ends the other processes too. UserError,
  KeyboardInterrupt and Stopped are then raised again; any other exception ends
  this process with a traceback.

  Raises:
    UserError: the environment makes no sense, or a process cannot be reached.
  """
  global _watch
  group = environment.find_group(os.environ, environment.has_tpu(os.environ))
  if group is None:
    yield
    return
  _connect(group)
  if jax.process_count() == 1:  # A TPU of one host.
    yield
    return
  _watch = watch = _Watch()
  try:
    watch.hosts.update(enumerate(gather(socket.gethostname())))
    logging.info(
      '%d processes, found by %s: %s',
      jax.process_count(),
      group.how,
      ', '.join(watch.hosts.values()),
    )
    if not is_first():  # The first process logs the same.
      logging.set_verbosity(logging.WARNING)
    yield
    wait_for_all()
  except preemption.Stopped:
    wait_for_all()  # All stop after the same step.
    raise
  except (UserError, KeyboardInterrupt) as error:
    if _may_come_from_another(error):
      watch.wait_for_cause()
    watch.report(error)
    raise
  except BaseException as error:
    watch.wait_for_cause()
    traceback.print_exc()
    watch.report(error)
    end_process(1)
  watch.stop()
  jax.distributed.shutdown()


def end_process(status: int) -> NoReturn:
  """Ends the process.

  With several processes, Python's own exit would wait for the others.
  """
  if _watch is None:
    sys.exit(status)
  sys.stdout.flush()
  sys.stderr.flush()
  _watch.linger()
  os._exit(status)


def _client() -> Any:
  """Returns JAX's connection to process 0, which has the key-value store."""
  return distributed.global_state.client


def _connect(group: environment.Group) -> None:
  """Connects to the other processes.

  Raises:
    UserError: a process cannot be reached.
  """
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  # The service catches SIGTERM; `preemption` starts it when it is polled.
  jax.config.update('jax_enable_preemption_service', False)
  what = 'the processes'
  if group.coordinator:
    what = f'the {group.processes} processes at {group.coordinator}'
    logging.info('process %d waits for all of %s', group.process, what)
  # JAX's own timeout aborts the process without a useful message.
  limit = threading.Timer(group.timeout, _give_up, [what, group])
  limit.daemon = True
  limit.start()
  try:
    jax.distributed.initialize(
      group.coordinator,
      group.processes,
      group.process,
      cluster_detection_method='deactivate' if group.coordinator else None,
      initialization_timeout=group.timeout + 60,
      heartbeat_timeout_seconds=_JAX_TIMEOUT,
    )
  except (RuntimeError, ValueError) as error:
    raise UserError(
      f'the processes, found by {group.how}, did not come together: '
      f'{first_line(error)}'
    ) from error
  finally:
    limit.cancel()


def _give_up(what: str, group: environment.Group) -> NoReturn:
  """Ends a process that has waited too long for the others."""
  print(
    f'error: {what}, found by {group.how}, did not come together within '
    f'{group.timeout} s: look into the log of each whether it was started, and '
    'whether process 0 can be reached there',
    file=sys.stderr,
    flush=True,
  )
  os._exit(1)


def _may_come_from_another(error: BaseException | None) -> bool:
  """Returns whether a process that has ended may be the cause of an error."""
  while error is not None:
    if isinstance(error, jax.errors.JaxRuntimeError):
      return True
    error = error.__cause__
  return False


class _Watch:
  """A thread that sends heartbeats and ends this process if another one ends.

  Process i watches process i + 1 only, so that each process sends and reads a
  constant number of keys per second. It writes what it notices where all
  processes read it.

  Attributes:
    hosts: process -> the name of its machine.
  """

  def __init__(self) -> None:
    """Starts the thread."""
    self.hosts: dict[int, str] = {}
    self._client = _client()
    self._me = jax.process_index()
    self._watched = f'{_ALIVE}/{(self._me + 1) % jax.process_count()}'
    self._timeout = _TIMEOUT
    self._stopped = threading.Event()
    self._lost: set[int] = set()
    self._is_reporting = False
    self._is_ending = False
    self._thread = threading.Thread(target=self._run, daemon=True)
    self._thread.start()

  def stop(self) -> None:
    """Ends the thread, after all processes have done their work."""
    self._stopped.set()
    self._thread.join()

  def wait_for_cause(self) -> None:
    """Gives the thread time to find out whether another process has ended.

    If one has, the thread ends this process.
    """
    # Another process may be slow to notice; watch all of them for a while.
    self._watched, self._timeout = _ALIVE, _TIMEOUT_AFTER_ERROR
    time.sleep(_TIMEOUT_AFTER_ERROR + 3 * _BEAT)
    if self._is_ending:
      self._thread.join()

  def report(self, error: BaseException) -> None:
    """Writes why this process ends, for the others."""
    self._is_reporting = True
    interrupted = isinstance(error, KeyboardInterrupt)
    text = 'interrupted' if interrupted else f'error: {first_line(error)}'
    self._write_failure(
      self._me,
      {'line': f'{text}, in {name()}', 'status': 130 if interrupted else 1},
    )

  def linger(self) -> None:
    """In process 0, waits until the others have read why all end."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      self._client.key_value_set(f'{_ENDED}/{self._me}', '')
      deadline = time.monotonic() + _LINGER
      while self._me == 0 and time.monotonic() < deadline:
        ended = self._client.key_value_dir_get(_ENDED)
        if len(ended) + len(self._lost) >= jax.process_count():
          return
        time.sleep(0.1)

  def _run(self) -> None:
    """Sends heartbeats and checks the others until one ends."""
    last_change: dict[int, tuple[str, float]] = {}
    for beat in itertools.count():
      try:
        self._client.key_value_set(
          f'{_ALIVE}/{self._me}/beat', str(beat), allow_overwrite=True
        )
        failed = self._client.key_value_dir_get(_FAILED)
        alive = self._client.key_value_dir_get(self._watched)
      except jax.errors.JaxRuntimeError:
        self._end(f'error: {name(0)} cannot be reached any more', 1)
        return
      for key, text in failed:
        self._end_with(int(key.rpartition('/')[2]), json.loads(text))
      now = time.monotonic()
      for key, value in alive:
        process = int(key.split('/')[-2])
        if last_change.get(process, ('', 0))[0] != value:
          last_change[process] = value, now
        elif now - last_change[process][1] > self._timeout:
          self._lose(process, now - last_change[process][1])
      if self._stopped.wait(_BEAT):
        return

  def _lose(self, process: int, seconds: float) -> None:
    """Tells all processes that one is lost, and ends this one."""
    line = (
      f'error: {name(process)} has not been heard of for {seconds:.0f} s: it '
      'was killed, or its machine or the network failed; start all processes '
      'again to go on from the last checkpoint'
    )
    failure = {'line': line, 'status': 1, 'is_lost': True}
    self._write_failure(process, failure)
    self._end_with(process, failure)

  def _write_failure(self, process: int, failure: dict[str, Any]) -> None:
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      self._client.key_value_set(f'{_FAILED}/{process}', json.dumps(failure))

  def _end_with(self, process: int, failure: dict[str, Any]) -> None:
    """Ends this process for the reason that a process has failed."""
    if failure.get('is_lost'):
      self._lost.add(process)
    self._end(failure['line'], failure['status'])

  def _end(self, line: str, status: int) -> None:
    """Ends this process, unless it ends for a reason of its own."""
    if self._is_reporting or self._stopped.is_set():
      return
    self._is_ending = True
    # The main thread works on for a moment; this has to be the last line.
    logging.set_verbosity(logging.FATAL)
    print(line, file=sys.stderr)
    end_process(status)
