"""Loads TensorFlow for the CPU, without a word. Import this before seqio.

TensorFlow only feeds data here: the accelerator's memory is JAX's. While its
libraries are loaded they write half a dozen lines about oneDNN and CUDA
straight to the standard error stream, before any setting of theirs is read.
"""

from collections.abc import Iterator
import contextlib
import os
import sys


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
  """Silences what is written to the file descriptor, by whatever language."""
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


# What it says later on: errors only. JAX sets 1 when it is imported first.
_LEVEL = 'TF_CPP_MIN_LOG_LEVEL'
os.environ[_LEVEL] = max('2', os.environ.get(_LEVEL, ''))
with _silent_stderr():
  import tensorflow

  tensorflow.config.set_visible_devices([], 'GPU')
