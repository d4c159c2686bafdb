"""Shows a task: `python -m dst_t5x.show_task TASK [--gin.NAME=VALUE]`.

For each split, the command prints the number of examples, how many pieces they
have, and the first ones as text and as pieces. It counts these examples:

  cut      those that TASK_FEATURE_LENGTHS shortens (`limit`, in pieces)
  unknown  those with pieces that the vocabulary lacks
  changed  those that encoding and decoding change

TASK is the name of a gin file in `gin/tasks`, or a task that such a file
registers. Use `--gin_file` for your own file.
"""

from dst_t5x.config import binaries
from dst_t5x.config import task_names
from dst_t5x.core import extras

if __name__ == '__main__':
  with extras.explained():
    from dst_t5x.data import task_report
  binaries.run(
    task_report.show_task,
    lambda argv: task_names.to_flags(argv, 'gin/runs/show_task.gin'),
  )
