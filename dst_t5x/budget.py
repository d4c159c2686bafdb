"""Prints what each method trains, and how large its file is.

    python -m dst_t5x.budget --gin_file=gin/models/t5_1_1_small.gin
    python -m dst_t5x.budget --gin_file=gin/models/t5_1_1_small.gin \
      --gin.FRACTION=1e-3

The first command prints the number of free parameters of every method, for its
usual settings. The second prints, for each method, the setting nearest to a
fraction of the model's parameters. `bytes` is the size of our file, `own bytes`
that of the format of a method's authors; `at most` says how many parameters can
differ from the seed on the way, and `states` how many bytes the optimizer and
the method keep beside the parameters. With a method's file, also your own, the
first row is this method's budget. Runs report the same numbers.
"""

from dst_t5x.config import binaries
from dst_t5x.engine import budget

if __name__ == '__main__':
  binaries.run(
    budget.show, lambda argv: ['--gin_file=gin/runs/budget.gin', *argv]
  )
