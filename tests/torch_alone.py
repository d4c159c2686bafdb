"""A Python with NumPy, safetensors and PyTorch alone, and what runs in it.

As after `pip install --no-deps dst_t5x` beside these three: nothing else that
is installed here can be imported. As a script it reads subset files from its
standard input and says what the reader for PyTorch thinks of them.
"""

import contextlib
import importlib.metadata
import json
import pathlib
import re
import struct
import subprocess
import sys
import tracemalloc

_REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
_ROOTS = ('numpy', 'safetensors', 'torch')
_START = (
  'import runpy, sys; sys.path[:0] = sys.argv[1:3]; '
  'sys.argv[:] = sys.argv[3:]; runpy.run_path(sys.argv[0], run_name="__main__")'
)
_LENGTH = struct.Struct('<Q')


def environment(folder):
  """Makes a folder of links to the three, and to what they ask for."""
  known, left = set(), list(_ROOTS)
  while left:
    name = left.pop()
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      found = importlib.metadata.distribution(name)
      if name in known:
        continue
      known.add(name)
      for line in found.requires or ():
        if 'extra ==' not in line:
          left.append(re.match(r'[\w.-]+', line)[0])
      for top in {file.parts[0] for file in found.files or ()}:
        source = pathlib.Path(found.locate_file(top))
        if top not in ('..', '__pycache__') and source.exists():
          (folder / top).symlink_to(source)
  assert {*_ROOTS} <= known
  return folder


def command(folder, script, *arguments):
  """Returns the command that runs a script there."""
  start = [sys.executable, '-S', '-P', '-E', '-c', _START]
  return [*start, str(folder), str(_REPOSITORY), str(script), *arguments]


class Reader:
  """The reader for PyTorch in a process of its own, without JAX."""

  def __init__(self, folder, seed):
    """Starts it.

    Args:
      folder: of `environment`.
      seed: an .npz file of the model's tensors by their paths.
    """
    self._process = subprocess.Popen(
      command(folder, pathlib.Path(__file__).resolve(), str(seed)),
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
    )

  def verdict(self, blob):
    """Returns why a file is not read and, if it is, why it is not applied."""
    self._process.stdin.write(_LENGTH.pack(len(blob)) + blob)
    self._process.stdin.flush()
    return json.loads(self._process.stdout.readline())

  def close(self):
    """Ends it; returns the most memory that a file took."""
    rest, _ = self._process.communicate()
    assert self._process.returncode == 0
    return json.loads(rest)


def _serve(seed):
  import numpy as np
  import torch

  from dst_t5x.core.errors import UserError
  from dst_t5x.subsets import file
  from dst_t5x.subsets import torch as dst

  model = torch.nn.Module()
  for path, array in np.load(seed).items():
    model.register_parameter(path, torch.nn.Parameter(torch.from_numpy(array)))
  before = {n: t.numpy().tobytes() for n, t in model.state_dict().items()}
  tracemalloc.start()
  while length := sys.stdin.buffer.read(_LENGTH.size):
    blob = sys.stdin.buffer.read(_LENGTH.unpack(length)[0])
    said = [None, None]
    try:
      subset = file.from_bytes(blob)[0]
      try:
        dst.apply(model, subset)
        dst.revert(model)
      except UserError as error:
        said[1] = str(error)
    except UserError as error:
      said[0] = str(error)
    print(json.dumps(said), flush=True)
  after = {n: t.numpy().tobytes() for n, t in model.state_dict().items()}
  assert after == before
  loaded = {name.partition('.')[0] for name in sys.modules}
  assert not loaded & {'jax', 'ml_dtypes', 'etils', 'tensorflow', 'flax'}
  print(tracemalloc.get_traced_memory()[1])


if __name__ == '__main__':
  _serve(sys.argv[1])
