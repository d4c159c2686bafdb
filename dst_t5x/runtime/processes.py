"""Many processes that start, work and end together.

`joined` connects the processes of a group (see `environment`) through JAX, and
sees to it that they end together: whatever ends one of them ends all, and each
says which process it was and why. Processes that vanish without a word, killed
or cut off, are missed within half a minute.

Everything here runs on the hosts, over the connection to process 0 that JAX has
anyway; no accelerator takes part, but in `gather_bytes`. Alone, a process needs
none of this, and all functions do the obvious.
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

_BEAT = 1.0  # Seconds between two signs of life.
_MISSED = 30.0  # Seconds without one after which a process counts as lost,
_MISSED_IN_TROUBLE = 6.0  # or if this process noticed that something is wrong.
_JAX_MISSED = 50  # Seconds; JAX itself then ends the process, without manners.
_LINGER = 5.0  # Seconds that others have to hear what is wrong.
_CHUNK = 16 * 2**20  # Bytes of each process that are exchanged at once.
_DAY = 24 * 3600 * 1000  # Milliseconds. Who is lost is missed before.

_rounds = itertools.count()
_watch: '_Watch | None' = None


def is_first() -> bool:
  """Whether this is the process that writes files and reports."""
  return jax.process_index() == 0


def name(process: int | None = None) -> str:
  """Returns what a process (by default this one) is called in messages."""
  process = jax.process_index() if process is None else process
  host = _watch.hosts.get(process) if _watch else None
  return f'process {process} ({host})' if host else f'process {process}'


def gather(text: str) -> list[str]:
  """Returns the text of each process; all of them have to call this."""
  if jax.process_count() == 1:
    return [text]
  client = _client()
  folder = f'dst_t5x/gathered/{next(_rounds)}'
  client.key_value_set(f'{folder}/{jax.process_index()}', text)
  client.wait_at_barrier(folder, _DAY)
  found = client.key_value_dir_get(folder)
  by_process = {int(key.rpartition('/')[2]): value for key, value in found}
  return [by_process[i] for i in range(jax.process_count())]


def wait_for_all() -> None:
  """Returns when all processes have come here."""
  gather('')


def agree(what: str, value: Any) -> None:
  """Checks that all processes have the same.

  Args:
    what: the value's name, for the message.
    value: JSON.

  Raises:
    UserError: they have not; which one differs.
  """
  texts = gather(json.dumps(value, sort_keys=True))
  for i, text in enumerate(texts):
    if text != texts[0]:
      raise UserError(
        f'{what} is {text} in {name(i)}, and {texts[0]} in {name(0)}'
      )


def gather_bytes(content: bytes) -> list[bytes]:
  """Returns the bytes of each process; all of them have to call this.

  They go over the accelerators' network, a few MiB at a time.
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
  """Works with the other processes of the group, if there is one.

  When something is raised inside, the other processes are told and end too;
  then it is raised on, but for what is no user's mistake: this ends the process
  with a traceback.

  Raises:
    UserError: the environment makes no sense, or the others are not there.
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
    if not is_first():  # What it says, the first one says too.
      logging.set_verbosity(logging.WARNING)
    yield
    wait_for_all()
  except preemption.Stopped:
    wait_for_all()  # They have stopped, too.
    raise
  except (UserError, KeyboardInterrupt) as error:
    if _is_others_fault(error):
      watch.wait_for_verdict()
    watch.tell(error)
    raise
  except BaseException as error:
    watch.wait_for_verdict()
    traceback.print_exc()
    watch.tell(error)
    leave(1)
  watch.stop()
  jax.distributed.shutdown()


def leave(status: int) -> NoReturn:
  """Ends the process, which may have told the others before.

  Among several, Python's own end would wait for the others.
  """
  if _watch is None:
    sys.exit(status)
  sys.stdout.flush()
  sys.stderr.flush()
  _watch.linger()
  os._exit(status)


def _client() -> Any:
  """Returns the connection to process 0, with its key-value store."""
  return distributed.global_state.client


def _connect(group: environment.Group) -> None:
  """Connects to the other processes.

  Raises:
    UserError: they cannot be reached.
  """
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  # It catches SIGTERM, and waits to be asked about it; see `preemption`.
  jax.config.update('jax_enable_preemption_service', False)
  what = 'the processes'
  if group.coordinator:
    what = f'the {group.processes} processes at {group.coordinator}'
    logging.info('process %d waits for all of %s', group.process, what)
  # JAX would end the process itself, without a word that helps.
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
      heartbeat_timeout_seconds=_JAX_MISSED,
    )
  except (RuntimeError, ValueError) as error:
    raise UserError(
      f'the processes, found by {group.how}, did not come together: '
      f'{first_line(error)}'
    ) from error
  finally:
    limit.cancel()


def _give_up(what: str, group: environment.Group) -> NoReturn:
  """Ends a process that has waited in vain."""
  print(
    f'error: {what}, found by {group.how}, did not come together within '
    f'{group.timeout} s: look into the log of each whether it was started, and '
    'whether process 0 can be reached there',
    file=sys.stderr,
    flush=True,
  )
  os._exit(1)


def _is_others_fault(error: BaseException | None) -> bool:
  """Whether an error may come from talking to a process that is no more."""
  while error is not None:
    if isinstance(error, jax.errors.JaxRuntimeError):
      return True
    error = error.__cause__
  return False


class _Watch:
  """Tells the others that this process lives, and notices when one ends.

  Attributes:
    hosts: process -> the name of its machine.
  """

  def __init__(self) -> None:
    """Starts watching."""
    self.hosts: dict[int, str] = {}
    self._client = _client()
    self._me = jax.process_index()
    self._missed = _MISSED
    self._stopped = threading.Event()
    self._lost: set[int] = set()
    self._is_telling = False
    self._is_ending = False
    self._thread = threading.Thread(target=self._run, daemon=True)
    self._thread.start()

  def stop(self) -> None:
    """Ends the thread: all went well, everywhere."""
    self._stopped.set()
    self._thread.join()

  def wait_for_verdict(self) -> None:
    """Gives the thread time to find out that it was another one's fault.

    If it was, it ends this process.
    """
    self._missed = _MISSED_IN_TROUBLE
    time.sleep(_MISSED_IN_TROUBLE + 3 * _BEAT)
    if self._is_ending:
      self._thread.join()

  def tell(self, error: BaseException) -> None:
    """Tells the others why this process ends."""
    self._is_telling = True
    interrupted = isinstance(error, KeyboardInterrupt)
    text = 'interrupted' if interrupted else f'error: {first_line(error)}'
    message = {'status': 130 if interrupted else 1, 'text': text}
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      self._client.key_value_set(
        f'dst_t5x/failed/{self._me}', json.dumps(message)
      )

  def linger(self) -> None:
    """Waits for the others to end: without process 0 they hear nothing."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      self._client.key_value_set(f'dst_t5x/ended/{self._me}', '')
      deadline = time.monotonic() + _LINGER
      while self._me == 0 and time.monotonic() < deadline:
        ended = self._client.key_value_dir_get('dst_t5x/ended')
        if len(ended) + len(self._lost) >= jax.process_count():
          return
        time.sleep(0.1)

  def _run(self) -> None:
    """Beats, and listens, until something is wrong."""
    seen: dict[str, tuple[str, float]] = {}
    for beat in itertools.count():
      try:
        self._client.key_value_set(
          f'dst_t5x/alive/{self._me}', str(beat), allow_overwrite=True
        )
        failed = self._client.key_value_dir_get('dst_t5x/failed')
        alive = self._client.key_value_dir_get('dst_t5x/alive')
      except jax.errors.JaxRuntimeError:
        self._end(f'error: {name(0)} cannot be reached any more', 1)
        return
      for key, text in failed:
        self._hear(int(key.rpartition('/')[2]), json.loads(text))
      now = time.monotonic()
      for key, value in alive:
        if seen.get(key, ('', 0))[0] != value:
          seen[key] = value, now
        elif now - seen[key][1] > self._missed:
          self._miss(int(key.rpartition('/')[2]), now - seen[key][1])
      if self._stopped.wait(_BEAT):
        return

  def _hear(self, process: int, message: dict[str, Any]) -> None:
    if process != self._me:
      text = f'{message["text"]}, in {name(process)}'
      self._end(text, message['status'])

  def _miss(self, process: int, seconds: float) -> None:
    self._lost.add(process)
    self._end(
      f'error: {name(process)} has not been heard of for {seconds:.0f} s: it '
      'was killed, or its machine or the network failed; start all processes '
      'again to go on from the last checkpoint',
      1,
    )

  def _end(self, line: str, status: int) -> None:
    """Ends this process, unless it is ending for a reason of its own."""
    if self._is_telling or self._stopped.is_set():
      return
    self._is_ending = True
    # The main thread works on for a moment; this is the last line.
    logging.set_verbosity(logging.FATAL)
    print(line, file=sys.stderr)
    leave(status)
