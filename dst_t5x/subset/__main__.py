"""`python -m dst_t5x.subset`: see `command`."""

import sys

from dst_t5x.subset import command

if __name__ == '__main__':
  sys.exit(command.main(sys.argv[1:]))
