"""Decodes: `python -m dst_t5x.infer --gin_file=… --gin.NAME=VALUE`.

The inputs are a task's split or a file. The file has one input a line, or rows
in the format of the task `jsonl`, whose targets are written with the
predictions.
"""

from dst_t5x.config import binaries
from dst_t5x.core import extras
from dst_t5x.runtime import processes

if __name__ == '__main__':
  with extras.explained():
    from dst_t5x.runs import inference
  binaries.run(inference.infer, joined=processes.joined)
