"""What this machine has."""

import os


def host_memory() -> int:
  """Returns the bytes of this machine's memory."""
  return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
