"""The Hugging Face Hub: `hf://organisation/name[@revision][/file.dst]`.

A path names a repository, which holds a model or subsets, or a subset file in
it. The package `huggingface_hub` downloads files into its cache, and takes what
is there where there is no network.
"""

from collections.abc import Iterator
import contextlib
import os
import pathlib
import re
from typing import Any, NamedTuple

from dst_t5x.core.errors import UserError, first_line

_PREFIX = 'hf://'
# No part may be `..`: it becomes a path in the cache.
_PART = r'\w[\w.-]*'
_SUBSET = re.compile(r'\w[\w .,+=()-]*\.dst')
_PATH = re.compile(
  rf'hf://({_PART}/{_PART})(?:@({_PART}(?:/{_PART})*?))?'
  rf'(?:/({_SUBSET.pattern}))?'
)
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


class _Path(NamedTuple):
  """The parts of a path; `text` is all of it."""

  text: str
  repository: str
  revision: str | None
  file: str | None

  def lasting(self, commit: str, file: str | None = None) -> str:
    """Returns the path at a commit, perhaps of a file."""
    return f'{_PREFIX}{self.repository}@{commit}' + (f'/{file}' if file else '')


def is_path(path: str | os.PathLike[str]) -> bool:
  """Returns whether a path is on the Hub."""
  return os.fspath(path).startswith(_PREFIX)


def is_subset(path: str | os.PathLike[str]) -> bool:
  """Returns whether a path names a subset file on the Hub.

  Raises:
    UserError: this is no path on the Hub.
  """
  return is_path(path) and _parsed(path).file is not None


def split(path: str | os.PathLike[str]) -> tuple[str, str | None]:
  """Returns the repository, `organisation/name`, and the revision of a path.

  Raises:
    UserError: this is no path on the Hub.
  """
  of = _parsed(path)
  return of.repository, of.revision


def check_file_name(name: str) -> None:
  """Checks that a path on the Hub can name a subset file.

  Raises:
    UserError: it cannot.
  """
  if not _SUBSET.fullmatch(name):
    raise UserError(
      f'{name!a} cannot be named on the Hub: call the file by letters, digits'
      ' and . , + = ( ) - _, with .dst at the end'
    )


def snapshot(path: str | os.PathLike[str]) -> tuple[pathlib.Path, str]:
  """Returns the local folder with a model's files, and its lasting name.

  Args:
    path: `hf://organisation/name`, of the branch `main`, or followed by
      `@revision`: a branch, a tag or a commit.

  Returns:
    The folder in the cache, which is empty or missing if the repository has no
    model; and `hf://organisation/name@commit`.

  Raises:
    UserError: this is no such path, there is no such repository or revision, it
      may not be read, or there is no network and the cache lacks it.
  """
  of = _parsed(path)
  if of.file:
    raise UserError(f'{of.text} is a subset, not a model')
  folder = _download(of, allow_patterns=_FILES)
  return folder, of.lasting(folder.name)


def local(path: str | os.PathLike[str]) -> pathlib.Path:
  """Returns the local path of a subset file, in the cache.

  Args:
    path: `hf://organisation/name[@revision]/file.dst`, or else the only subset
      in `hf://organisation/name[@revision]`.

  Raises:
    UserError: see `snapshot`; or there is no such file, or more than one.
  """
  return cached(only_subset(path))


def only_subset(path: str | os.PathLike[str]) -> str:
  """Returns the lasting name of the subset that `local` returns."""
  names = subsets(path)
  if len(names) > 1:
    files = [name.rpartition('/')[2] for name in names]
    raise UserError(
      f'{os.fspath(path)} has {len(files)} subsets: name one,'
      f' {os.fspath(path)}/{files[0]}'
    )
  return names[0]


def subsets(path: str | os.PathLike[str]) -> list[str]:
  """Returns the lasting names of subset files, which are then in the cache.

  Args:
    path: `hf://organisation/name[@revision]`, of all files `*.dst` at the top
      of the repository; or of one of them, `…/file.dst`.

  Returns:
    `hf://organisation/name@commit/file.dst`, sorted.

  Raises:
    UserError: see `snapshot`; or there is no such file.
  """
  of = _parsed(path)
  folder = _download(
    of, allow_patterns=of.file or '*.dst', ignore_patterns='*/*'
  )
  files = [file.name for file in folder.glob(of.file or '*.dst')]
  files = sorted(filter(_SUBSET.fullmatch, files))  # Others cannot be named.
  if not files:
    raise UserError(f'{of.text}: there is no subset {of.file or "*.dst"}')
  return [of.lasting(folder.name, file) for file in files]


def cached(path: str | os.PathLike[str]) -> pathlib.Path:
  """Returns where a model or a subset file is in the cache; asks no network.

  Raises:
    UserError: this is no path on the Hub, or the cache lacks it.
  """
  of = _parsed(path)
  files = of.file or _FILES
  folder = _download(of, allow_patterns=files, local_files_only=True)
  return folder / of.file if of.file else folder


def _parsed(path: str | os.PathLike[str]) -> _Path:
  text = os.fspath(path)
  if not (found := _PATH.fullmatch(text)):
    raise UserError(
      f'{text} must be hf://organisation/name, or'
      ' hf://organisation/name@revision, of a subset file followed by /FILE.dst'
    )
  return _Path(text, *found.groups())


def _download(of: _Path, **options: Any) -> pathlib.Path:
  """Returns a repository's folder in the cache.

  Args:
    of: whose files to download.
    **options: of `huggingface_hub.snapshot_download`.
  """
  try:
    import huggingface_hub  # Takes a while; and not there beside PyTorch alone.
  except ImportError as e:
    raise UserError(
      f'{of.text} needs huggingface_hub: pip install huggingface_hub'
    ) from e
  with _one_line(of):
    folder = huggingface_hub.snapshot_download(
      of.repository, revision=of.revision, **options
    )
  return pathlib.Path(folder)


@contextlib.contextmanager
def _one_line(of: _Path) -> Iterator[None]:
  """Turns errors of the Hub, the network and the disk into UserErrors."""
  from huggingface_hub import errors

  revision = of.revision and f'--revision={of.revision}'
  command = ' '.join(filter(None, ['hf download', of.repository, revision]))
  known = {
    errors.GatedRepoError: (
      f'is gated: accept its terms on https://huggingface.co/{of.repository},'
      ' and set HF_TOKEN or use `hf auth login`'
    ),
    errors.RepositoryNotFoundError: (
      'is not on the Hub, or is private: then set HF_TOKEN or use `hf auth'
      ' login`'
    ),
    errors.RevisionNotFoundError: f'has no revision {of.revision}',
    errors.LocalEntryNotFoundError: (
      'is not in the cache of the Hub (HF_HOME), which cannot be reached: use'
      f' `{command}` where there is a network'
    ),
  }
  try:
    yield
  except Exception as e:  # Of whatever kind.
    for kind, why in known.items():
      if isinstance(e, kind):
        raise UserError(f'{of.text} {why}') from e
    raise UserError(f'{of.text} cannot be downloaded: {first_line(e)}') from e
