"""WMT's sentences where SacreBLEU would have put them; import what is needed.

The test sets of 2021 and 2022 are whole and real. The earlier ones, which are
for training, hold real sentences too: those of 2021 that are not drawn for
development, a few for each set.
"""

from collections.abc import Iterator
import pathlib

import pytest

_PAIR = 'de-en'


def real_lines(shared_data, name):
  """The lines of a file of shared data."""
  return (shared_data / 'wmt' / name).read_text().removesuffix('\n').split('\n')


def write_set(folder, name, **fields):
  """Writes a set as SacreBLEU does; `__` in a field's name becomes a colon."""
  place = folder / name
  place.mkdir(parents=True, exist_ok=True)
  for field, lines in fields.items():
    stem = f'{name.replace("/", "_")}.{_PAIR}.{field.replace("__", ":")}'
    (place / stem).write_text(''.join(f'{line}\n' for line in lines))


@pytest.fixture(scope='module')
def sacrebleu_folder(shared_data, tmp_path_factory) -> Iterator[pathlib.Path]:
  """A folder as SacreBLEU fills it, which the module's tasks then use.

  No longer than a module: while its variable is set, commands cannot be forked.
  """
  from dst_t5x.tasks import wmt

  folder = tmp_path_factory.mktemp('sacrebleu')
  lines = {
    (year, part): real_lines(shared_data, f'{year}.{_PAIR}.{part}')
    for year in ('newstest2021', 'generaltest2022')
    for part in ('src.de', 'ref.A.en', 'ref.B.en')
  }
  source, first, second = (
    lines['newstest2021', part] for part in ('src.de', 'ref.A.en', 'ref.B.en')
  )
  # Names as SacreBLEU 2.6 gives them, and below as 2.0 did.
  write_set(folder, 'wmt21', **{'src': source, 'ref-A': first, 'ref-B': second})
  write_set(
    folder,
    'wmt22',
    src=lines['generaltest2022', 'src.de'],
    ref__refA=lines['generaltest2022', 'ref.A.en'],
    ref__refB=lines['generaltest2022', 'ref.B.en'],
  )
  rest = sorted(set(range(1000)) - set(wmt.sample(500, 1000)))
  for i, name in enumerate(wmt.TRAIN_SETS):
    rows = rest[i :: len(wmt.TRAIN_SETS)]
    write_set(
      folder, name, src=[source[j] for j in rows], ref=[first[j] for j in rows]
    )
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('SACREBLEU', str(folder))
    yield folder
