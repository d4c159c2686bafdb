"""A process that carries out runs of a sweep in sequence.

`local` starts it: `python -m launch.worker`. Each command comes in as one line
of JSON, and one line goes out when it is done. The output of a run goes to its
log. TensorFlow and JAX are imported once for many runs, and a crash affects one
run only. When standard input ends because the sweep was killed, the worker
stops its run as after Ctrl-C and ends.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import gc
import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
from typing import Any, TextIO

from dst_t5x.config import binaries
from dst_t5x.core.errors import UserError, first_line
from dst_t5x.runtime import interrupts
from dst_t5x.runtime import preemption

# Settings that do not change the compiled programs of a run.
_NUMBERS = tuple(
  f'--gin.{name}='
  for name in ('LEARNING_RATE', 'EPSILON', 'RANDOM_SEED', 'MODEL_DIR')
)
_last_program: list[str] = []


def main() -> None:
  """Serves until standard input ends."""
  # Output of libraries must not mix with the answers.
  answers = os.fdopen(os.dup(1), 'w', buffering=1)
  os.dup2(2, 1)
  interrupts.listen()
  is_busy = threading.Event()
  requests = _requests(is_busy)
  from dst_t5x.runs import training  # This takes about ten seconds.

  del training
  _answer(answers, {'ready': True})
  commands: dict[str, Callable[..., dict[str, Any]]] = {
    'train': train_run,
    'check': check_run,
  }
  try:
    while (request := requests.get()) is not None:
      command = commands[request.pop('command')]
      is_busy.set()
      answer = command(**request)
      is_busy.clear()
      _answer(answers, answer)
  except (KeyboardInterrupt, BrokenPipeError):
    pass


def train_run(flags: Sequence[str], log: str) -> dict[str, Any]:
  """Trains as `python -m dst_t5x.train` does.

  Args:
    flags: the arguments of training.
    log: file to which the output is appended.

  Returns:
    `seconds`, and `error` (one line) if it failed.
  """
  from dst_t5x.runs import training

  _forget_other_programs(flags)
  started, error = time.monotonic(), ''
  with _output_to(log):
    binaries.log_quietly()
    print('$ python -m dst_t5x.train', *flags, flush=True)
    try:
      binaries.parse(flags, training.train)()
      print('finished', flush=True)
    except (UserError, preemption.Stopped) as e:
      error = first_line(e)
    except (Exception, KeyboardInterrupt) as e:
      if interrupts.caused(e):
        error = 'interrupted'
        interrupts.set_exit_status()
      else:
        traceback.print_exc()
        error = f'{type(e).__name__}: {first_line(e)}'
    if error:
      print('interrupted' if error == 'interrupted' else f'error: {error}',
            flush=True)  # fmt: skip
  return {'seconds': time.monotonic() - started, 'error': error}


def _forget_other_programs(flags: Sequence[str]) -> None:
  """Frees compiled programs unless the last run used the same ones.

  Runs that differ in numbers only share programs; see `trainer.Trainer`.
  """
  import jax

  global _last_program
  program = [flag for flag in flags if not flag.startswith(_NUMBERS)]
  if program != _last_program:
    jax.clear_caches()
    gc.collect()
  _last_program = program


def check_run(
  flags: Sequence[str], folder: str, with_work: bool = False
) -> dict[str, Any]:
  """Checks a run's configuration against what its folder contains.

  Args:
    flags: arguments of `python -m dst_t5x.train`.
    folder: the run's MODEL_DIR.
    with_work: whether to compute `planning.work`, which takes longer.

  Returns:
    `error` (one line) if the run would fail, and `work` if requested.
  """
  from dst_t5x.planning import work
  from dst_t5x.runs import identity
  from dst_t5x.runs import training

  try:
    binaries.parse(flags, training.train)
    identity.check(folder, identity.of(training.train))
    return {'error': '', 'work': work.of_flags(flags) if with_work else {}}
  except UserError as e:
    return {'error': first_line(e)}


def _requests(
  is_busy: threading.Event,
) -> 'queue.SimpleQueue[dict[str, Any] | None]':
  """Returns the queue of commands; None marks the end."""
  requests: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()

  def read() -> None:
    for line in sys.stdin:
      requests.put(json.loads(line))
    requests.put(None)
    if is_busy.is_set():
      os.kill(os.getpid(), signal.SIGINT)

  threading.Thread(target=read, daemon=True).start()
  return requests


def _answer(answers: TextIO, content: dict[str, Any]) -> None:
  answers.write(json.dumps(content) + '\n')


@contextlib.contextmanager
def _output_to(path: str) -> Iterator[None]:
  """Redirects standard output and errors, those of C++ too, to a file."""
  before = os.dup(1), os.dup(2)
  os.makedirs(os.path.dirname(path), exist_ok=True)
  with open(path, 'a', encoding='utf-8') as log:
    try:
      os.dup2(log.fileno(), 1)
      os.dup2(log.fileno(), 2)
      yield
    finally:
      sys.stdout.flush()
      sys.stderr.flush()
      for descriptor, copy in zip((1, 2), before, strict=True):
        os.dup2(copy, descriptor)
        os.close(copy)


if __name__ == '__main__':
  main()
