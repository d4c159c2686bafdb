"""Serves many subsets on one seed: `python -m dst_t5x.serve --help`."""

import sys

from dst_t5x.core import extras

if __name__ == '__main__':
  with extras.explained():
    from dst_t5x.serving import server
  sys.exit(server.main(sys.argv[1:]))
