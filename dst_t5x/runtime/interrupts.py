"""Ctrl-C: it is not lost, wherever it strikes, and nothing crashes after it."""

import atexit
import os
import signal
import sys
import threading
from typing import Any

STATUS = 128 + signal.SIGINT


def listen() -> None:
  """Makes sure that Ctrl-C raises KeyboardInterrupt, in all that we call."""
  signal.signal(signal.SIGINT, _interrupt)
  sys.unraisablehook = _unraisable


def end() -> None:
  """Lets the process end with status 130, once Python's threads have ended.

  XLA compiles in a thread of its own, which goes on when Ctrl-C has taken the
  main one away. At the interpreter's end JAX would take its client down, and
  what is being compiled would crash.
  """
  atexit.register(_end)  # What is registered last runs first.


def led_to(error: BaseException | None) -> bool:
  """Whether this is Ctrl-C, or what failed while it was being handled.

  TensorFlow, for one, fails when it is left in the middle of tracing.
  """
  while error is not None:
    if isinstance(error, KeyboardInterrupt):
      return True
    error = error.__cause__ or error.__context__
  return False


def _end() -> None:
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(STATUS)


def _interrupt(*unused: Any) -> None:
  """Handles Ctrl-C just as Python does.

  Python's own handler is replaced by asyncio while it runs, as in Orbax when it
  saves, by one whose interrupts can get lost.
  """
  raise KeyboardInterrupt


def _unraisable(unraisable: Any) -> None:
  """Keeps quiet about callbacks of libraries, which fail after all else."""
  if unraisable.exc_type is KeyboardInterrupt:
    # It hit a destructor: once more, but not in here, where it would be lost.
    main = threading.main_thread().ident
    threading.Timer(0.01, signal.pthread_kill, [main, signal.SIGINT]).start()
