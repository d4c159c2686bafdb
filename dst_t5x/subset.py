"""Shows, checks, applies, exports, compares, publishes subset files."""

import sys

from dst_t5x.checkpoints import subset_command

if __name__ == '__main__':
  sys.exit(subset_command.main(sys.argv[1:]))
