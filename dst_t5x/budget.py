"""What each method trains, and how large its file is.

    python -m dst_t5x.budget --gin_file=gin/models/t5_1_1_small.gin
    python -m dst_t5x.budget --gin_file=gin/models/t5_1_1_small.gin \
      --gin.FRACTION=1e-3

The first prints the number of free parameters of every method, over its usual
settings; the second, for each method, the setting nearest to a fraction of the
model's parameters. The file of a method, of your own too, adds its budget as
the first row. What runs report of themselves is counted here, too.
"""

from dst_t5x.config import binaries
from dst_t5x.engine import budget

if __name__ == '__main__':
  binaries.run(
    budget.show, lambda argv: ['--gin_file=gin/runs/budget.gin', *argv]
  )
