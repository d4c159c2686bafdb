"""Fetches what a task needs: `python -m dst_t5x.prepare_data TASK`.

Once, where there is a network; training then needs none. With the environment
variable DST_DATA_DIR everything lies in that folder, which other users may read
and need not write to; without it, TFDS_DATA_DIR, SACREBLEU and DST_VOCABULARY
say where, or the libraries' own places in the home folder are used. TASK is a
gin file's name in `gin/tasks`, or a task that such a file registers;
`--gin_file` takes files of one's own.
"""

from dst_t5x.config import binaries
from dst_t5x.config import task_names
from dst_t5x.data import preparation

if __name__ == '__main__':
  binaries.run(
    preparation.prepare_data,
    lambda argv: task_names.to_flags(argv, 'gin/runs/prepare_data.gin'),
  )
