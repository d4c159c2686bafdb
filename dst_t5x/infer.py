"""Decodes: `python -m dst_t5x.infer --gin_file=… --gin.NAME=VALUE`.

The inputs are a task's split, or a file: text with one input a line, or rows as
the task `jsonl` has them, whose targets are then kept beside the predictions.
"""

from dst_t5x.config import binaries
from dst_t5x.runs import inference
from dst_t5x.runtime import processes

if __name__ == '__main__':
  binaries.run(inference.infer, joined=processes.joined)
