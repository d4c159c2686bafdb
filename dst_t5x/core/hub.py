"""Models of the Hugging Face Hub: `hf://organisation/name[@revision]`.

The package `huggingface_hub` downloads their files into its cache, and takes
what is there where there is no network.
"""

import os
import pathlib
import re

from dst_t5x.core.errors import UserError, first_line

_PREFIX = 'hf://'
# No part may be `..`: it becomes a path in the cache.
_PART = r'\w[\w.-]*'
_NAME = re.compile(rf'hf://({_PART}/{_PART})(?:@({_PART}(?:/{_PART})*))?')
# What belongs beside a model: its tokenizer, in any form, and how to sample.
COMPANIONS = (
  'added_tokens.json',
  'chat_template.jinja',
  'generation_config.json',
  'merges.txt',
  'special_tokens_map.json',
  'spiece.model',
  'tokenizer.json',
  'tokenizer.model',
  'tokenizer_config.json',
  'vocab.json',
)
# Weights as pickles, and those of other frameworks, are not downloaded.
_FILES = [
  *('config.json', '*.safetensors', '*.safetensors.index.json'),
  *COMPANIONS,
]


def is_model(path: str | os.PathLike[str]) -> bool:
  """Returns whether a path names a model of the Hub."""
  return os.fspath(path).startswith(_PREFIX)


def snapshot(path: str | os.PathLike[str]) -> tuple[pathlib.Path, str]:
  """Returns the local folder with a model's files, and its lasting name.

  Args:
    path: `hf://organisation/name`, of the branch `main`, or followed by
      `@revision`: a branch, a tag or a commit.

  Returns:
    The folder in the cache; and `hf://organisation/name@commit`.

  Raises:
    UserError: this is no such path, there is no such model or revision, it may
      not be read, or there is no network and the cache lacks it.
  """
  found = _NAME.fullmatch(os.fspath(path))
  if not found:
    raise UserError(
      f'{os.fspath(path)} must be hf://organisation/name, or'
      ' hf://organisation/name@revision'
    )
  name, revision = found.groups()
  import huggingface_hub  # Takes a while.
  from huggingface_hub import errors

  known = {
    errors.GatedRepoError: (
      f'is gated: accept its terms on https://huggingface.co/{name}, and set'
      ' HF_TOKEN or use `hf auth login`'
    ),
    errors.RepositoryNotFoundError: (
      'is not on the Hub, or is private: then set HF_TOKEN or use `hf auth'
      ' login`'
    ),
    errors.RevisionNotFoundError: f'has no revision {revision}',
    errors.LocalEntryNotFoundError: (
      'is not in the cache of the Hub (HF_HOME), which cannot be reached: use'
      f' `hf download {name}` where there is a network'
    ),
  }
  try:
    folder = huggingface_hub.snapshot_download(
      name, revision=revision, allow_patterns=_FILES
    )
  except Exception as e:  # The network's and the disk's, of whatever kind.
    for kind, why in known.items():
      if isinstance(e, kind):
        raise UserError(f'{os.fspath(path)} {why}') from e
    raise UserError(
      f'{os.fspath(path)} cannot be downloaded: {first_line(e)}'
    ) from e
  here = pathlib.Path(folder)
  return here, f'{_PREFIX}{name}@{here.name}'
