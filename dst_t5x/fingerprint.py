"""Prints the identity of a model: a hash of all its parameters.

    python -m dst_t5x.fingerprint DIR

DIR is a run, a T5X checkpoint or a Hugging Face folder. The command prints one
line: the step and the fingerprint of the checkpoint, the last one for a run.
"""

import sys

from dst_t5x.checkpoints import seeds
from dst_t5x.core import errors


def main(arguments: list[str]) -> int:
  """Prints the step and the fingerprint of what is at a path."""
  if len(arguments) != 1 or arguments[0].startswith('-'):
    print('usage: python -m dst_t5x.fingerprint DIR', file=sys.stderr)
    return 2
  try:
    seed = seeds.load_seed(arguments[0])
  except errors.UserError as error:
    print(f'error: {error}', file=sys.stderr)
    return 1
  print(seed.step, seed.fingerprint)
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
