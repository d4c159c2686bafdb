"""WMT's test sets in SacreBLEU's folder.

SacreBLEU stores its downloads as texts, one sentence a line, in the folder that
the environment variable SACREBLEU names (`~/.sacrebleu` by default):
`wmt22/wmt22.de-en.src`, `wmt22/wmt22.de-en.ref-A` and so on. Reading needs only
these files: no network and no permission to write.
"""

from collections.abc import Mapping
import os
import pathlib
import re
from typing import Any, NamedTuple

from sacrebleu import dataset as sacrebleu_dataset
from sacrebleu.dataset import plain_text

from dst_t5x.core.errors import UserError, first_line, nearest
from dst_t5x.data import text_files

FOLDER_VARIABLE = 'SACREBLEU'
# No set of SacreBLEU's, but part of an archive that it downloads for another.
SYSCOMB = 'newssyscomb2009'
_SYSCOMB_ARCHIVE = 'wmt19/dev'
_SYSCOMB_LANGUAGES = ('cs', 'de', 'es', 'fr')


class Pairs(NamedTuple):
  """A test set.

  Attributes:
    sources: sentences.
    references: the translations of each sentence, in the alphabetical order of
      the translators' names; '' if a translator left it out.
  """

  sources: list[str]
  references: list[tuple[str, ...]]


def folder() -> pathlib.Path:
  """Returns SacreBLEU's folder."""
  return pathlib.Path(
    os.environ.get(FOLDER_VARIABLE) or pathlib.Path.home() / '.sacrebleu'
  )


def is_there(name: str, pair: str) -> bool:
  """Returns whether a set can be read.

  Args:
    name: the set's name, such as `wmt22` or `wmt14/full`.
    pair: a pair of languages, such as `de-en`.

  Raises:
    UserError: SacreBLEU knows no such set or pair.
  """
  _find(name, pair)
  source, references = _files(name, pair)
  return source.is_file() and bool(references)


def read(name: str, pair: str) -> Pairs:
  """Returns a set; arguments as in `is_there`.

  Raises:
    UserError: SacreBLEU knows no such set or pair, or its files are missing or
      have different numbers of lines.
  """
  if not is_there(name, pair):
    source, _ = _files(name, pair)
    raise UserError(
      f"SacreBLEU's folder {str(folder())!r} ({FOLDER_VARIABLE}) lacks {name!r}"
      f' for {pair!r}: no {source.name} and its .ref; fetch it where there is a'
      ' network with `python -m dst_t5x.prepare_data TASK`'
    )
  source, references = _files(name, pair)
  lines = {path: _read_lines(path) for path in (source, *references)}
  for path in references:
    if len(lines[path]) != len(lines[source]):
      raise UserError(
        f'{path} has {len(lines[path])} lines, but {source.name}'
        f' {len(lines[source])}: delete both and fetch {name!r} again'
      )
  streams = [lines[path] for path in references]
  return Pairs(lines[source], list(zip(*streams, strict=True)))


def fetch(name: str, pair: str) -> None:
  """Makes SacreBLEU download a missing set; arguments as in `is_there`.

  Raises:
    UserError: SacreBLEU knows no such set or pair, it cannot be downloaded, or
      the folder cannot be written to.
  """
  if is_there(name, pair):
    return
  try:
    _find(name, pair).process_to_text(pair)
  except SystemExit as error:  # SacreBLEU reports a wrong checksum this way.
    raise UserError(
      f'SacreBLEU could not fetch {name!r}; see its message above'
    ) from error
  except Exception as error:  # Errors of the network, the archive or the disk.
    raise UserError(
      f'SacreBLEU cannot fetch {name!r} into {str(folder())!r}'
      f' ({FOLDER_VARIABLE}): {first_line(error)}'
    ) from error


def _find(name: str, pair: str) -> Any:
  """Returns SacreBLEU's data set.

  Raises:
    UserError: SacreBLEU knows no such set or pair.
  """
  known = _datasets()
  if name not in known:
    raise UserError(f'SacreBLEU has no set {name!r}{nearest(name, known)}')
  data_set = known[name]
  if pair not in data_set.langpairs:
    raise UserError(
      f'set {name!r} of SacreBLEU has no pair {pair!r}; it has'
      f' {", ".join(sorted(data_set.langpairs))}'
    )
  return data_set


def _datasets() -> Mapping[str, Any]:
  archive = sacrebleu_dataset.DATASETS[_SYSCOMB_ARCHIVE]
  files = {
    code: f'dev/{SYSCOMB}.{code}' for code in ('en', *_SYSCOMB_LANGUAGES)
  }
  pairs = [(code, 'en') for code in _SYSCOMB_LANGUAGES]
  pairs += [('en', code) for code in _SYSCOMB_LANGUAGES]
  syscomb = plain_text.PlainTextDataset(
    SYSCOMB,
    data=archive.data,
    md5=archive.md5,
    langpairs={f'{a}-{b}': [files[a], files[b]] for a, b in pairs},
  )
  return sacrebleu_dataset.DATASETS | {SYSCOMB: syscomb}


def _files(name: str, pair: str) -> tuple[pathlib.Path, list[pathlib.Path]]:
  """Returns the paths of the source and of the existing references."""
  place = folder() / name
  stem = f'{name.replace("/", "_")}.{pair}'
  # SacreBLEU 2.0 wrote `.ref:refA`, 2.6 writes `.ref-refA` or `.ref-A`.
  pattern = re.compile(re.escape(stem) + r'\.ref(?:[:-](?:ref)?(.*))?')
  by_name: dict[str, pathlib.Path] = {}
  for path in sorted(place.glob(f'{stem}.ref*')):
    if match := pattern.fullmatch(path.name):
      by_name.setdefault(match.group(1) or '', path)
  if len(by_name) > 1:  # A `.ref` beside named ones is a copy of the first.
    by_name.pop('', None)
  return place / f'{stem}.src', [by_name[label] for label in sorted(by_name)]


def _read_lines(path: pathlib.Path) -> list[str]:
  return [text.strip() for text in text_files.read_texts(str(path), path)]
