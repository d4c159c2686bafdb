"""Evaluates: `python -m dst_t5x.eval --gin_file=… --gin.NAME=VALUE`.

The checkpoint is a run's, or a seed for the zero-shot score.
"""

from dst_t5x.config import binaries
from dst_t5x.runs import evaluating
from dst_t5x.runtime import processes

if __name__ == '__main__':
  binaries.run(evaluating.evaluate, joined=processes.joined)
