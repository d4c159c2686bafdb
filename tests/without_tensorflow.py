"""Runs commands in a process where TensorFlow and seqio cannot be imported.

python tests/without_tensorflow.py '[["train", "--gin_file=…"], …]'
"""

import importlib
import json
import sys

MISSING = (
  *('clu', 'seqio', 't5', 'tensorflow', 'tensorflow_datasets'),
  'tensorflow_text',
)


class _Missing:
  """A finder before all others, for which these packages do not exist."""

  @staticmethod
  def find_spec(name, path=None, target=None):
    if name.split('.')[0] in MISSING:
      raise ModuleNotFoundError(f'No module named {name!r}', name=name)


def block():
  """Makes imports fail as where the packages are not installed."""
  sys.meta_path.insert(0, _Missing)


if __name__ == '__main__':
  block()
  import commands

  for module, *arguments in json.loads(sys.argv[1]):
    commands.call(module, *arguments)
  assert not set(MISSING) & set(sys.modules)
  assert importlib.import_module('dst_t5x')
