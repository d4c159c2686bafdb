"""Imports TensorFlow for the CPU without log lines. Import this before seqio.

Raises UserError where they are not installed.

TensorFlow only reads data here; JAX has the accelerator's memory. While its
libraries load, they write lines about oneDNN and CUDA to file descriptor 2
before they read any setting.
"""

from collections.abc import Iterator
import contextlib
import importlib.util
import os
import sys

from dst_t5x.core import extras


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
for _package in ('tensorflow', 'seqio'):
  if importlib.util.find_spec(_package) is None:
    raise extras.missing(_package)
with _silent_stderr():
  import tensorflow

  tensorflow.config.set_visible_devices([], 'GPU')
