"""Files by their content: the SHA-256, read no more often than they change.

A file's state is what `stat` says of it. Its change time is the system's own:
whoever copies another file of equal size and modification time over it cannot
set it. But the clock of a file system is coarse: the state of a file that has
just been changed is not trusted yet, and the file is read again.
"""

import hashlib
import os
import threading
import time
from typing import NamedTuple

import cachetools

# More than the clock of any usual file system takes for one step.
SETTLED_SECONDS = 2.0
_MOST_STATES = 2**16


class Content(NamedTuple):
  """What is in a file.

  Attributes:
    blob: all of it.
    digest: its SHA-256, 64 hexadecimal digits.
  """

  blob: bytes
  digest: str


def of(blob: bytes) -> Content:
  """Returns the content of a file that is all of `blob`."""
  return Content(blob, hashlib.sha256(blob).hexdigest())


class Digests:
  """Those of the files that were read; safe to use from several threads."""

  def __init__(self) -> None:
    self._lock = threading.Lock()
    self._known: cachetools.LRUCache[tuple[int, ...], str] = (
      cachetools.LRUCache(_MOST_STATES)
    )

  def get(self, status: os.stat_result) -> str | None:
    """Returns the digest of a file in this state, None if it is not known."""
    with self._lock:
      return self._known.get(_state(status))

  def read(self, path: str | os.PathLike[str]) -> Content:
    """Reads a file.

    Raises:
      OSError: it cannot be read.
    """
    with open(path, 'rb') as f:
      status, now = os.fstat(f.fileno()), time.time()
      content = of(f.read())
    if now - status.st_ctime > SETTLED_SECONDS:
      with self._lock:
        self._known[_state(status)] = content.digest
    return content


def _state(status: os.stat_result) -> tuple[int, ...]:
  return (
    status.st_dev,
    status.st_ino,
    status.st_size,
    status.st_mtime_ns,
    status.st_ctime_ns,
  )
