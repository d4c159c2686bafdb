"""Fixtures over prepared data; import them into the test files that need them.

Real rows of GSM8K become a TFDS folder through the real TFDS builder, without
a network: TFDS looks for a download in a cache folder first.
"""

from collections.abc import Iterator
import json
import pathlib
import shutil

import pytest


def _fill_download_cache(rows: pathlib.Path, downloads: pathlib.Path) -> None:
  """Lays the files where TFDS would have put what it downloads."""
  from tensorflow_datasets.core.download import checksums
  from tensorflow_datasets.core.download import resource
  from tensorflow_datasets.text.gsm8k import gsm8k

  first = (rows / 'test.jsonl').read_text().splitlines()[0] + '\n'
  for split, url in gsm8k._URLS.items():
    path = downloads / resource.get_dl_fname(url)
    if split in ('train', 'test'):
      shutil.copy(rows / f'{split}.jsonl', path)
    else:  # The socratic splits are not read; TFDS refuses empty ones.
      path.write_text(first)
    size = checksums.compute_url_info(path)
    info = {
      'dataset_names': ['gsm8k'],
      'urls': [url],
      'original_fname': f'{split}.jsonl',
      'url_info': {
        'size': int(size.size),
        'checksum': size.checksum,
        'filename': f'{split}.jsonl',
      },
    }
    resource.get_info_path(path).write_text(json.dumps(info))


@pytest.fixture(scope='session')
def tfds_data_dir(shared_data, tmp_path_factory) -> pathlib.Path:
  """A TFDS data folder with the real rows of GSM8K, and seqio reading it."""
  seqio = pytest.importorskip('seqio')
  import tensorflow_datasets as tfds

  folder = tmp_path_factory.mktemp('tfds')
  downloads = folder / 'downloads' / 'gsm8k'
  downloads.mkdir(parents=True)
  _fill_download_cache(shared_data / 'gsm8k', downloads)
  tfds.builder('gsm8k', data_dir=folder).download_and_prepare()
  seqio.set_tfds_data_dir_override(str(folder))
  return folder


@pytest.fixture(scope='session')
def vocabulary_file(shared_data) -> Iterator[pathlib.Path]:
  """The real SentencePiece model of T5, which all tasks then use."""
  path = next((shared_data / 'vocab').glob('*.model'))
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('DST_VOCABULARY', str(path))
    yield path


@pytest.fixture(scope='session')
def gsm8k_task(tfds_data_dir, vocabulary_file):
  """The registered task `gsm8k`, over real rows and the real vocabulary."""
  import seqio

  from dst_t5x.tasks import gsm8k

  return seqio.TaskRegistry.get(gsm8k.NAME)
