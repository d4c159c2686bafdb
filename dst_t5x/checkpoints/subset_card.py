"""Folders of subset files for the Hugging Face Hub, with their model card.

    python -m dst_t5x.subset card a.dst --output DIR --base-model lab/base

A card says what the files know, and what the author states beside them. What
nobody states is left out, or said to be unknown.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import os
import re
from typing import Any, NamedTuple

from etils import epath

from dst_t5x.checkpoints import card_text
from dst_t5x.checkpoints import checkpoint_files
from dst_t5x.checkpoints.card_text import Base
from dst_t5x.checkpoints.card_text import Card
from dst_t5x.checkpoints.card_text import Entry
from dst_t5x.core import hub
from dst_t5x.core import whole_files
from dst_t5x.core.errors import UserError
from dst_t5x.subsets import definition
from dst_t5x.subsets import extraction
from dst_t5x.subsets import file
from dst_t5x.subsets import metadata

README = 'README.md'
# Identifiers of the Hub.
_LICENSE = re.compile(r'[a-z0-9][a-z0-9.+-]*')
_DATASET = re.compile(r'\w[\w.-]*(/\w[\w.-]*)?')


@dataclasses.dataclass(frozen=True)
class Stated:
  """What the author states; None and () where nothing is.

  Attributes:
    base_model: of the Hub, `organisation/name[@revision]`.
    repository: of the Hub, where the folder will be, `organisation/name`.
    license: its identifier on the Hub.
    datasets: their identifiers on the Hub.
  """

  base_model: str | None = None
  repository: str | None = None
  license: str | None = None
  datasets: Sequence[str] = ()

  def check(self) -> None:
    """Raises UserError if something is no identifier of the Hub."""
    _repository('--base-model', self.base_model)
    if _repository('--repository', self.repository)[1]:
      raise UserError('--repository takes no revision')
    if self.license is not None and not _LICENSE.fullmatch(self.license):
      raise UserError(
        f'--license {self.license!a} is no identifier of the Hub, such as mit'
        ' or apache-2.0'
      )
    for dataset in self.datasets:
      if not _DATASET.fullmatch(dataset):
        raise UserError(
          f'--dataset {dataset!a} is no dataset of the Hub, such as'
          ' openai/gsm8k'
        )


class Written(NamedTuple):
  """What was written.

  Attributes:
    num_bytes: of all subset files.
    unknown: the options that would say what the card does not.
  """

  num_bytes: int
  unknown: list[str]


def write(
  target: epath.PathLike, files: Sequence[str], stated: Stated
) -> Written:
  """Writes a folder with subset files and their card, ready to be uploaded.

  A file gets the base's place on the Hub in place of the seed's on this
  machine, which is nobody else's business; the rest stays as it is.

  Args:
    target: the new folder.
    files: of subsets of one seed.
    stated: what the author states.

  Raises:
    UserError: a file is damaged, cannot be named on the Hub, or is of another
      seed than the first one; something stated is no identifier of the Hub; or
      the folder exists already or cannot be written.
  """
  stated.check()
  loaded = _loaded(files)
  base = _base(stated, [about for _, about in loaded.values()])
  blobs = {
    name: file.to_bytes(subset, _published(about, base))
    for name, (subset, about) in loaded.items()
  }
  entries = [
    Entry(name, subset, metadata.shown(about), len(blobs[name]))
    for name, (subset, about) in loaded.items()
  ]
  card = Card(
    entries, base, stated.repository, stated.license, list(stated.datasets)
  )
  text = card_text.of(card)
  with checkpoint_files.new_folder(epath.Path(target)) as folder:
    for name, blob in blobs.items():
      whole_files.write_bytes(folder / name, blob)
    whole_files.write_text(folder / README, text)
  options = {
    '--base-model': base.name,
    '--repository': stated.repository,
    '--license': stated.license,
  }
  unknown = [option for option, value in options.items() if value is None]
  return Written(sum(map(len, blobs.values())), unknown)


def _loaded(
  files: Sequence[str],
) -> dict[str, tuple[definition.Subset, dict[str, Any]]]:
  """Returns name -> subset and metadata of files, which are of one seed."""
  loaded: dict[str, tuple[definition.Subset, dict[str, Any]]] = {}
  for path in files:
    place = hub.only_subset(path) if hub.is_path(path) else path
    name = os.path.basename(place)
    hub.check_file_name(name)
    if name in loaded:
      raise UserError(f'two files are called {name}: rename one')
    loaded[name] = file.load(path)
    first = next(iter(loaded.values()))[0]
    try:
      extraction.check_same_seed(first, loaded[name][0])
    except UserError as e:
      raise UserError(
        f'{files[0]} and {path}: {str(e).removeprefix("subset: ")}'
      ) from e
  return loaded


def _base(stated: Stated, abouts: Sequence[Mapping[str, Any]]) -> Base:
  """Returns where the base is: as stated, or as all files say."""
  fingerprint = abouts[0]['seed']['fingerprint']
  if stated.base_model:
    return Base(*_repository('--base-model', stated.base_model), fingerprint)
  paths = {str(about['seed'].get('path')) for about in abouts}
  try:
    name, revision = hub.split(paths.pop()) if len(paths) == 1 else (None, None)
  except UserError:  # It is no place on the Hub.
    name, revision = None, None
  return Base(name, revision, fingerprint)


def _published(about: Mapping[str, Any], base: Base) -> dict[str, Any]:
  """Returns a file's metadata without the paths of this machine."""
  seed = {k: v for k, v in about['seed'].items() if k != 'path'}
  if base.name:
    seed |= {'path': base.path, 'name': base.name, 'format': 'hf'}
  return {**about, 'seed': seed}


def _repository(option: str, text: str | None) -> tuple[str | None, str | None]:
  """Returns the name and the revision of a repository; None for None."""
  if text is None:
    return None, None
  try:
    if not hub.is_subset(f'hf://{text}'):
      return hub.split(f'hf://{text}')
  except UserError:
    pass
  raise UserError(
    f'{option} {text!a} is no repository of the Hub, organisation/name'
  )
