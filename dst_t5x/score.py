"""Scores written predictions: `python -m dst_t5x.score FILE …`."""

import sys

from dst_t5x.data import score_command

if __name__ == '__main__':
  sys.exit(score_command.main(sys.argv[1:]))
