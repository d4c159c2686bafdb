"""What a command does when nobody reads its output any more: `… | head`."""

import os
import sys


def leave() -> int:
  """Sends what is left of the output nowhere; returns the exit status.

  Whoever read it has seen enough. 141 is what a shell says of a process that
  SIGPIPE ended.
  """
  os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
  return 141
