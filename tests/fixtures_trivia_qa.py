"""Real questions of TriviaQA, prepared by TFDS's own builder, offline."""

import ast
import csv
import io
import json
import pathlib
import tarfile

from fixtures_data import tfds_data_dir  # noqa: F401
import pytest

_ARCHIVE = 'triviaqa-unfiltered.tar.gz'
_MEMBERS = {
  'train': 'unfiltered-web-train.json',
  'validation': 'unfiltered-web-dev.json',
  'test': 'unfiltered-web-test-without-answers.json',
}


def read_rows(shared_data, split):
  """(question, accepted answers) of each row; the first answer is the target.

  The official target, `Value`, is not in these files.
  """
  csv.field_size_limit(10**8)
  path = shared_data / 'trivia_qa' / f'{split}.tsv'
  with path.open(encoding='utf-8', newline='') as file:
    return [
      (question.replace('""', '"').strip('"'), ast.literal_eval(answers))
      for question, answers in csv.reader(file, delimiter='\t')
    ]


def _record(number, question, answers):
  record = {
    'Question': question,
    'QuestionId': str(number),
    'QuestionSource': '',
    'SearchResults': [],
    'EntityPages': [],
  }
  if answers is not None:
    record['Answer'] = {
      'Aliases': answers,
      'NormalizedAliases': [answer.lower() for answer in answers],
      'Value': answers[0],
      'NormalizedValue': answers[0].lower(),
      'Type': '',
    }
  return record


def _fill_download_cache(shared_data, downloads, builder_class):
  """Lays the archive where TFDS would have put what it downloads."""
  from tensorflow_datasets.core.download import resource

  (url,) = (url for url in builder_class.url_infos if url.endswith(_ARCHIVE))
  checksum = builder_class.url_infos[url].checksum
  path = downloads / resource.get_dl_fname(url, checksum)
  rows = {s: read_rows(shared_data, s) for s in ('train', 'validation')}
  # TFDS refuses empty splits; the answers of the test set are not public.
  rows['test'] = [(question, None) for question, _ in rows['validation'][:2]]
  with tarfile.open(path, 'w:gz') as archive:
    for split, name in _MEMBERS.items():
      records = [_record(i, *row) for i, row in enumerate(rows[split])]
      # The builder finds records by their indentation.
      content = json.dumps({'Data': records}, indent=4).encode()
      member = tarfile.TarInfo(f'triviaqa-unfiltered/{name}')
      member.size = len(content)
      archive.addfile(member, io.BytesIO(content))
  info = {
    'dataset_names': ['trivia_qa'],
    'urls': [url],
    'original_fname': _ARCHIVE,
  }
  resource.get_info_path(path).write_text(json.dumps(info))


@pytest.fixture(scope='session')
def trivia_qa_data_dir(tfds_data_dir, shared_data) -> pathlib.Path:  # noqa: F811
  """The TFDS data folder of all tests, now with TriviaQA too."""
  import tensorflow_datasets as tfds

  downloads = tfds_data_dir / 'downloads' / 'trivia_qa'
  downloads.mkdir(parents=True)
  _fill_download_cache(shared_data, downloads, tfds.builder_cls('trivia_qa'))
  builder = tfds.builder(
    'trivia_qa/unfiltered.nocontext', data_dir=tfds_data_dir
  )
  builder.download_and_prepare()
  return tfds_data_dir
