"""Downloads a task's data: `python -m dst_t5x.prepare_data TASK`.

This needs a network once; training then needs none. The environment variable
DST_DATA_DIR names a folder for everything, which other users can read without
writing to it. Otherwise TFDS_DATA_DIR, SACREBLEU and DST_VOCABULARY name the
places; by default they are the libraries' own in the home folder. TASK is the
name of a gin file in `gin/tasks`, or a task that such a file registers. Use
`--gin_file` for your own file.

    python -m dst_t5x.prepare_data TASK --batches DIR (the flags of training)

This writes the batches of a training command into DIR, tokenised and packed,
once. `gin/runs/from_batches.gin` reads them, without TensorFlow and seqio.
"""

from dst_t5x.config import binaries
from dst_t5x.core import extras

if __name__ == '__main__':
  with extras.explained():
    from dst_t5x.runs import batch_sets
  binaries.command(lambda argv: batch_sets.main(argv, binaries.parse))
