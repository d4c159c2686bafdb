"""What an adapter says of itself in the format of Hugging Face PEFT.

PEFT's adapter_config.json has the settings, and says what is adapted by a list
of modules' names, or of their last parts; its tensors are named after these
modules. `checkpoints.peft_files` reads and writes the files.
"""

from collections.abc import Collection, Mapping
from typing import NamedTuple

import numpy as np


class Base(NamedTuple):
  """The model that an adapter belongs to.

  Attributes:
    names: path of each linear map -> PEFT's name of it.
    shapes: path of each linear map -> [n, features].
    tables: path of each table of embeddings -> [vocab, embed].
  """

  names: Mapping[str, str]
  shapes: Mapping[str, tuple[int, int]]
  tables: Mapping[str, tuple[int, int]]


class Tensor(NamedTuple):
  """A tensor of an adapter.

  Attributes:
    path: in our tree.
    name: in the file, behind the name of the linear map; of what belongs to
      none, its whole name.
    shape: in the file.
    our_shape: in our tree.
    transposed: whether ours has the axes the other way round.
    module: path of the linear map that it belongs to; '' for none.
    may_be_twice: whether the file may hold a second one below it, which nobody
      reads.
  """

  path: str
  name: str
  shape: tuple[int, ...]
  our_shape: tuple[int, ...]
  transposed: bool = False
  module: str = ''
  may_be_twice: bool = False

  def exported(self, array: np.ndarray) -> np.ndarray:
    """Returns the array as the file has it, float32."""
    array = np.asarray(array, np.float32)
    array = array.T if self.transposed else array
    return np.ascontiguousarray(array.reshape(self.shape))

  def imported(self, array: np.ndarray) -> np.ndarray:
    """Returns a float32 array of the file as we have it, a copy."""
    array = array.T if self.transposed else array
    return np.array(array.reshape(self.our_shape), order='C')


def last_parts(modules: Collection[str], base: Base) -> list[str]:
  """Returns the last parts of PEFT's names of linear maps, in order."""
  return sorted({base.names[module].rpartition('.')[2] for module in modules})
