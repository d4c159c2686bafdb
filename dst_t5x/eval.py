"""Evaluates: `python -m dst_t5x.eval --gin_file=… --gin.NAME=VALUE`.

Takes a checkpoint of a run, or a seed as it is, which is the zero-shot score.
"""

from dst_t5x.config import binaries
from dst_t5x.runs import evaluating
from dst_t5x.runtime import processes

if __name__ == '__main__':
  binaries.run(evaluating.evaluate, joined=processes.joined)
