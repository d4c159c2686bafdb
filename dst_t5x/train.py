"""Trains: `python -m dst_t5x.train --gin_file=… --gin.NAME=VALUE`.

Gin configures `runs.training.train`, which calls `Trainer.train_step` for each
batch. `runs.run.Run` writes the files of the run.
"""

from dst_t5x.config import binaries
from dst_t5x.runs import training
from dst_t5x.runtime import processes

if __name__ == '__main__':
  binaries.run(training.train, joined=processes.joined)
