"""Subsets in PyTorch: for who has the base model, and no JAX.

    from dst_t5x.subsets import torch as dst

    subset = dst.load('gsm8k.dst')
    with dst.apply(model, subset):  # In place, on a Hugging Face module.
      model.generate(...)

NumPy, safetensors and PyTorch are all that this needs. See docs/pytorch.md.
"""

import os

from dst_t5x.subsets import definition
from dst_t5x.subsets import file
from dst_t5x.subsets.definition import Subset
from dst_t5x.subsets.file import save
from dst_t5x.subsets.torch.applying import Placed
from dst_t5x.subsets.torch.applying import apply
from dst_t5x.subsets.torch.applying import merge
from dst_t5x.subsets.torch.applying import place
from dst_t5x.subsets.torch.applying import revert
from dst_t5x.subsets.torch.extracting import extract
from dst_t5x.subsets.torch.folders import fingerprint

__all__ = [
  'Placed',
  'Subset',
  'apply',
  'extract',
  'fingerprint',
  'load',
  'merge',
  'place',
  'revert',
  'save',
]


def load(path: str | os.PathLike[str]) -> definition.Subset:
  """Reads a subset file; `subsets.file.load` also returns its metadata.

  Args:
    path: the file; or `hf://organisation/name[@revision][/file.dst]`, which
      needs the package `huggingface_hub`.

  Raises:
    UserError: there is no such file, or it is no complete, undamaged subset
      file of this version.
  """
  return file.load(path)[0]
