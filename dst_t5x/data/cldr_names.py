"""Names in a language and in English: a small real task that needs no network.

The Unicode CLDR has the names of territories, languages, scripts and currencies
in hundreds of languages. Babel, a dependency, contains it.
"""

from collections.abc import Iterable, Iterator
import hashlib
import pathlib
from typing import NamedTuple

import babel
from etils import epath

from dst_t5x.core import json_text
from dst_t5x.core import whole_files

KINDS = ('territories', 'languages', 'scripts', 'currencies')
# Split -> its tenths of all names.
SPLITS = {'train': range(7), 'dev': range(7, 8), 'test': range(8, 10)}


class Name(NamedTuple):
  """A name in two languages.

  Attributes:
    code: its kind and CLDR's code, such as `territories/DE`.
    name: in the language.
    english: in English.
  """

  code: str
  name: str
  english: str

  @property
  def split(self) -> str:
    """The split of the name, which is the same in every language.

    What is held out in one language is not seen in another one, so that the
    languages can be compared and mixed.
    """
    tenth = int(hashlib.sha256(self.code.encode()).hexdigest(), 16) % 10
    return next(name for name, tenths in SPLITS.items() if tenth in tenths)


def names(language: str) -> Iterator[Name]:
  """Yields the names that differ from the English ones.

  Names with brackets are left out: most of them are years of old currencies.

  Args:
    language: its code, such as `de`.

  Raises:
    babel.UnknownLocaleError: CLDR does not have the language.
  """
  ours, english = babel.Locale(language), babel.Locale('en')
  for kind in KINDS:
    ours_of = getattr(ours, kind)
    for code, text in sorted(getattr(english, kind).items()):
      name = ours_of.get(code)
      if name and name.casefold() != text.casefold() and '(' not in name + text:
        yield Name(f'{kind}/{code}', name, text)


def title(language: str) -> str:
  """Returns the English name of a language."""
  return str(babel.Locale(language).get_language_name('en'))


def write_files(language: str, folder: pathlib.Path) -> dict[str, pathlib.Path]:
  """Writes the rows of each split in the format of the task `jsonl`.

  Args:
    language: its code.
    folder: for the files, which are made again as they were.

  Returns:
    Split -> file.
  """
  rows: dict[str, list[dict[str, str]]] = {split: [] for split in SPLITS}
  for name in names(language):
    rows[name.split].append(
      {
        'inputs': f'{title(language)}: {name.name}\nEnglish:',
        'targets': f' {name.english}',
      }
    )
  files = {split: folder / f'{language}_{split}.jsonl' for split in SPLITS}
  for split, path in files.items():
    write_rows(path, rows[split])
  return files


def write_rows(path: pathlib.Path, rows: Iterable[dict[str, str]]) -> None:
  """Writes rows as JSON lines, in an order that does not follow the codes."""
  lines = [json_text.dumps(row, ensure_ascii=False) for row in rows]
  lines.sort(key=lambda line: hashlib.sha256(line.encode()).digest())
  path.parent.mkdir(parents=True, exist_ok=True)
  whole_files.write_text(epath.Path(path), '\n'.join(lines) + '\n')
