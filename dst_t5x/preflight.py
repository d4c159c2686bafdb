"""Looks whether a run can start: `python -m dst_t5x.preflight --gin_file=…`.

Takes the arguments of `python -m dst_t5x.train`, on all hosts, and trains
nothing: it says on the first what it found, and ends with the first thing that
is wrong and the process and host where it is. Training begins with the same
checks, but for the seed, which it loads and compares anyway.
"""

from dst_t5x.config import binaries
from dst_t5x.runs import training
from dst_t5x.runtime import processes

if __name__ == '__main__':
  binaries.run(
    training.train,
    lambda argv: [*argv, '--gin.training.train.only_check=True'],
    processes.joined,
  )
