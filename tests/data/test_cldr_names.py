"""Names from CLDR: held out alike in all languages, and the same each time."""

import json

import pytest

from dst_t5x.data import cldr_names

_LANGUAGES = ('de', 'fr', 'es', 'ja')


def _rows(path):
  lines = path.read_text(encoding='utf-8').splitlines()
  return [tuple(json.loads(line).values()) for line in lines]


@pytest.mark.parametrize('language', _LANGUAGES)
def test_rows_are_pairs_of_different_names(language, tmp_path):
  files = cldr_names.write_files(language, tmp_path)
  assert list(files) == ['train', 'dev', 'test']
  rows = {split: _rows(path) for split, path in files.items()}
  number = sum(map(len, rows.values()))
  assert number == len(list(cldr_names.names(language))) > 500
  assert 0.6 < len(rows['train']) / number < 0.8
  title = cldr_names.title(language)
  for inputs, targets in rows['test']:
    given = inputs.removeprefix(f'{title}: ').removesuffix('\nEnglish:')
    assert len(given) == len(inputs) - len(title) - len(': \nEnglish:')
    assert given.casefold() != targets.strip().casefold()


def test_what_is_held_out_is_held_out_in_every_language():
  splits = {}
  for language in _LANGUAGES:
    for name in cldr_names.names(language):
      assert splits.setdefault(name.code, name.split) == name.split
  assert set(splits.values()) == set(cldr_names.SPLITS)


def test_files_are_the_same_each_time(tmp_path):
  first = cldr_names.write_files('de', tmp_path / 'a')
  again = cldr_names.write_files('de', tmp_path / 'b')
  for split, path in first.items():
    assert path.read_bytes() == again[split].read_bytes()
  # Not in the order of the codes, which would put all currencies together.
  texts = [targets for _, targets in _rows(first['train'])]
  in_order = [f' {x.english}' for x in cldr_names.names('de')]
  assert texts != [text for text in in_order if text in texts]
