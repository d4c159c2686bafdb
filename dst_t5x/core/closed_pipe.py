"""The end of a command whose output is no longer read, as in `… | head`."""

import os
import sys


def discard_output() -> int:
  """Discards the rest of the output; returns the exit status.

  The status is 141, the same as that of a process that SIGPIPE ended.
  """
  os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
  return 141
