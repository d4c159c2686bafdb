"""Real rows of SuperGLUE, prepared by TFDS's own builders, offline."""

import json
import zipfile

from fixtures_data import tfds_data_dir  # noqa: F401
import pytest

# TFDS's name of a task -> its folder, here and in the archive.
FOLDERS = {
  'boolq': 'BoolQ',
  'cb': 'CB',
  'copa': 'COPA',
  'multirc': 'MultiRC',
  'record': 'ReCoRD',
  'rte': 'RTE',
  'wic': 'WiC',
  'wsc.fixed': 'WSC',
}
# The mixture also trains on Definite Pronoun Resolution, of which we have no
# real rows: these are ours, in its format.
PRONOUNS = {
  'train': (
    ('The cat chased the mouse because it was hungry.', 'it', 'The cat'),
    ('The cat chased the mouse because it looked tasty.', 'it', 'the mouse'),
    ('Ann thanked Eve because she had been helped.', 'she', 'Ann'),
    ('Ann thanked Eve because she had helped.', 'she', 'Eve'),
  ),
  'test': (('Tom beat Max, so he won the cup.', 'he', 'Tom'),),
}
_CANDIDATES = {
  'it': 'The cat,the mouse',
  'she': 'Ann,Eve',
  'he': 'Tom,Max',
}


def _describe(path, dataset, url):
  """Writes what makes TFDS take a file for what it would have downloaded."""
  from tensorflow_datasets.core.download import resource

  info = {
    'dataset_names': [dataset],
    'urls': [url],
    'original_fname': path.name,
  }
  resource.get_info_path(path).write_text(json.dumps(info))


def _download_path(folder, dataset, url):
  from tensorflow_datasets.core.download import checksums
  from tensorflow_datasets.core.download import resource

  downloads = folder / 'downloads' / dataset
  downloads.mkdir(parents=True, exist_ok=True)
  registered = checksums.get_all_url_infos()[url].checksum
  return downloads / resource.get_dl_fname(url, registered)


def fill_download_cache(shared_data, folder):
  """Lays SuperGLUE's archives and the pronouns where TFDS looks for them."""
  import tensorflow_datasets as tfds
  from tensorflow_datasets.text import definite_pronoun_resolution

  for config, name in FOLDERS.items():
    url = tfds.builder_cls('super_glue').builder_configs[config].data_url
    path = _download_path(folder, 'super_glue', url)
    with zipfile.ZipFile(path, 'w') as archive:
      for split in ('train', 'val', 'test'):
        rows = shared_data / 'super_glue' / name / f'{split}.jsonl'
        archive.write(rows, f'{name}/{split}.jsonl')
    _describe(path, 'super_glue', url)
  for split, rows in PRONOUNS.items():
    url = definite_pronoun_resolution._DATA_URL_PATTERN.format(split)
    path = _download_path(folder, 'definite_pronoun_resolution', url)
    path.write_text(
      ''.join(
        f'{sentence}\n{pronoun}\n{_CANDIDATES[pronoun]}\n{answer}\n\n'
        for sentence, pronoun, answer in rows
      )
    )
    _describe(path, 'definite_pronoun_resolution', url)


@pytest.fixture(scope='session')
def super_glue_data_dir(shared_data, tfds_data_dir):  # noqa: F811
  """The folder of GSM8K's data, which now has SuperGLUE's as well."""
  import tensorflow_datasets as tfds

  fill_download_cache(shared_data, tfds_data_dir)
  names = [f'super_glue/{config}' for config in FOLDERS]
  for name in (*names, 'definite_pronoun_resolution'):
    tfds.builder(name, data_dir=tfds_data_dir).download_and_prepare()
  return tfds_data_dir
