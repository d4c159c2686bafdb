"""Downloads a task's data: `python -m dst_t5x.prepare_data TASK`.

This needs a network once; training then needs none. The environment variable
DST_DATA_DIR names a folder for everything, which other users can read without
writing to it. Otherwise TFDS_DATA_DIR, SACREBLEU and DST_VOCABULARY name the
places; by default they are the libraries' own in the home folder. TASK is the
name of a gin file in `gin/tasks`, or a task that such a file registers. Use
`--gin_file` for your own file.
"""

from dst_t5x.config import binaries
from dst_t5x.config import task_names
from dst_t5x.data import preparation

if __name__ == '__main__':
  binaries.run(
    preparation.prepare_data,
    lambda argv: task_names.to_flags(argv, 'gin/runs/prepare_data.gin'),
  )
