"""Imports TensorFlow for the CPU without log lines. Import this before seqio.

TensorFlow only reads data here; JAX has the accelerator's memory. While its
libraries load, they write lines about oneDNN and CUDA to file descriptor 2
before they read any setting.
"""

from collections.abc import Iterator
import contextlib
import os
import sys


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
  """Discards output to file descriptor 2, from C++ too."""
  sys.stderr.flush()
  kept = os.dup(2)
  nowhere = os.open(os.devnull, os.O_WRONLY)
  os.dup2(nowhere, 2)
  try:
    yield
  finally:
    os.dup2(kept, 2)
    os.close(kept)
    os.close(nowhere)


# Later, TensorFlow logs errors only. JAX sets 1 if it is imported first.
_LEVEL = 'TF_CPP_MIN_LOG_LEVEL'
os.environ[_LEVEL] = max('2', os.environ.get(_LEVEL, ''))
with _silent_stderr():
  import tensorflow

  tensorflow.config.set_visible_devices([], 'GPU')
