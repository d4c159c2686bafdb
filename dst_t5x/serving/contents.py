"""Caches the SHA-256 of files, and reads a file again only when it changes.

A file has changed if its `stat` has. The system sets the change time (ctime):
a program that replaces a file can copy its size and modification time, but not
its ctime. A file system's clock is coarse, so the digest of a file that changed
less than `SETTLED_SECONDS` ago is not cached.
"""

import hashlib
import os
import threading
import time
from typing import NamedTuple

import cachetools

from dst_t5x.core import object_stores

# Longer than one tick of the clock of any usual file system.
SETTLED_SECONDS = 2.0
_MOST_STATES = 2**16


class Content(NamedTuple):
  """The content of a file.

  Attributes:
    blob: the bytes.
    digest: their SHA-256, 64 hexadecimal digits.
  """

  blob: bytes
  digest: str


def of(blob: bytes) -> Content:
  """Returns the content of a file with these bytes."""
  return Content(blob, hashlib.sha256(blob).hexdigest())


class Digests:
  """The digests of the files that were read. Thread-safe."""

  def __init__(self) -> None:
    self._lock = threading.Lock()
    self._known: cachetools.LRUCache[object_stores.State, str] = (
      cachetools.LRUCache(_MOST_STATES)
    )

  def get(self, status: os.stat_result) -> str | None:
    """Returns the digest of a file with this `stat`; None if unknown."""
    with self._lock:
      return self._known.get(object_stores.state_of(status))

  def read(self, path: str | os.PathLike[str]) -> Content:
    """Reads a file and returns its content.

    Raises:
      OSError: the file cannot be read.
    """
    with open(path, 'rb') as f:
      status, now = os.fstat(f.fileno()), time.time()
      content = of(f.read())
    if now - status.st_ctime > SETTLED_SECONDS:
      with self._lock:
        self._known[object_stores.state_of(status)] = content.digest
    return content
