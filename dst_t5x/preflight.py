"""Checks that a run can start: `python -m dst_t5x.preflight --gin_file=…`.

Run this on all hosts with the arguments of `python -m dst_t5x.train`. It trains
nothing. The first process prints what it has checked. The command ends at the
first error and names its process and host. Training begins with the same
checks, except that it compares the seed when it loads it.
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
