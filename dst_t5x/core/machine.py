"""Properties of this machine."""

import os


def host_memory() -> int:
  """Returns the size of this machine's memory, in bytes."""
  return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
