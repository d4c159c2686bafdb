"""Estimates what a training command needs on each device, and if it fits.

    python -m dst_t5x.estimate --gin_file=gin/models/t5_1_1_xl.gin \
      --gin_file=gin/tasks/super_glue.gin --gin_file=gin/methods/dst.gin \
      --gin.MODEL_PARALLELISM=4 --topology=v4:4x4x4

The flags are those of `python -m dst_t5x.train` and --topology, the kind and
the number of accelerators: v4:4x4x4, v5e:2x2, h200:8, or cpu. Without a
method's file all methods are estimated, without a model's file all sizes. The
output has our own count and the plan of XLA's compiler for as many virtual
CPUs. Compiling takes minutes if layers are not stacked; --gin.COMPILE=False
skips it. Nothing is allocated, read or written.
"""

from dst_t5x.config import binaries
from dst_t5x.planning import estimate

if __name__ == '__main__':
  binaries.command(estimate.main)
