"""Shows a task: `python -m dst_t5x.show_task TASK [--gin.NAME=VALUE]`.

For each split: how many examples there are, how many pieces they have, and the
first ones as text and as pieces. Of the examples are

  cut      those that TASK_FEATURE_LENGTHS shortens (`limit`, in pieces)
  unknown  those with pieces that the vocabulary does not know
  changed  those that do not come back from the vocabulary as they were

TASK is a gin file's name in `gin/tasks`, or a task that such a file registers;
`--gin_file` takes files of one's own.
"""

from dst_t5x.config import binaries
from dst_t5x.config import task_names
from dst_t5x.data import task_report

if __name__ == '__main__':
  binaries.run(
    task_report.show_task,
    lambda argv: task_names.to_flags(argv, 'gin/runs/show_task.gin'),
  )
