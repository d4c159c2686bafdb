"""What a training command needs of each device, and whether that fits.

    python -m dst_t5x.estimate --gin_file=gin/models/t5_1_1_xl.gin \
      --gin_file=gin/tasks/super_glue.gin --gin_file=gin/methods/dst.gin \
      --gin.MODEL_PARALLELISM=4 --topology=v4:4x4x4

Takes the flags of `python -m dst_t5x.train`, and --topology: an accelerator and
how many, v4:4x4x4, v5e:2x2, h200:8, or cpu. Without a method's file all methods
are estimated, without a model's all sizes. Beside our own count stands what
XLA's compiler plans (for CPUs, as many virtual ones), which takes minutes where
layers are not stacked: --gin.COMPILE=False leaves it out. Nothing is allocated,
read or written.
"""

from dst_t5x.config import binaries
from dst_t5x.planning import estimate

if __name__ == '__main__':
  binaries.command(estimate.main)
