"""Serves many subsets on one seed: `python -m dst_t5x.serve --help`."""

import sys

from dst_t5x.serving import server

if __name__ == '__main__':
  sys.exit(server.main(sys.argv[1:]))
