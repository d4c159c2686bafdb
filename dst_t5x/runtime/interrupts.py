"""Ctrl-C ends a command cleanly wherever it arrives, with status 130."""

import atexit
import os
import signal
import sys
import threading
from typing import Any

STATUS = 128 + signal.SIGINT


def listen() -> None:
  """Makes Ctrl-C raise KeyboardInterrupt, inside libraries too."""
  signal.signal(signal.SIGINT, _interrupt)
  sys.unraisablehook = _unraisable


def set_exit_status() -> None:
  """Makes the process exit with status 130 once Python's threads have ended.

  XLA compiles in a thread of its own, which continues after Ctrl-C. JAX's exit
  handler would delete the client, and the compilation would crash.
  """
  atexit.register(_end)  # The handler that is registered last runs first.


def caused(error: BaseException | None) -> bool:
  """Returns whether an error is Ctrl-C, or was raised while handling it.

  For example, TensorFlow raises an error if tracing is interrupted.
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
  """Handles Ctrl-C as Python's own handler does.

  asyncio, which Orbax uses to save, replaces Python's own handler while it
  runs. Its handler can lose interrupts. It does not replace another handler.
  """
  raise KeyboardInterrupt


def _unraisable(unraisable: Any) -> None:
  """Does not print errors in callbacks of libraries after an interrupt."""
  if unraisable.exc_type is KeyboardInterrupt:
    # A destructor was interrupted, and Python drops its exceptions. Interrupt
    # the main thread again later.
    main = threading.main_thread().ident
    threading.Timer(0.01, signal.pthread_kill, [main, signal.SIGINT]).start()
