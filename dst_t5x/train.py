"""Trains: `python -m dst_t5x.train --gin_file=… --gin.NAME=VALUE`.

From a gin file to the step: gin binds `train`, which runs `Trainer.train_step`
for each batch. What a run leaves behind is the business of `run.Run`.
"""

from dst_t5x.config import binaries
from dst_t5x.runs import training
from dst_t5x.runtime import processes

if __name__ == '__main__':
  binaries.run(training.train, joined=processes.joined)
