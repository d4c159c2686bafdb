"""prepare_data: once, into a folder that others may read."""

import json
import os
import pathlib
import shutil
import stat

import commands
from fixtures_data import tfds_data_dir  # noqa: F401
from fixtures_data import vocabulary_file  # noqa: F401
import pytest
import seqio
import tensorflow as tf
import tensorflow_datasets as tfds

from dst_t5x.core import data_folders
from dst_t5x.core.errors import UserError
from dst_t5x.data import preparation
from dst_t5x.data import task_vocabulary
from dst_t5x.data import vocabulary


class ToyBroken(tfds.core.GeneratorBasedBuilder):
  """A data set that cannot be downloaded."""

  VERSION = tfds.core.Version('1.0.0')
  pkg_dir_path = pathlib.Path(__file__).parent

  def _info(self):
    features = tfds.features.FeaturesDict({'x': tf.int64})
    return tfds.core.DatasetInfo(builder=self, features=features)

  def _split_generators(self, dl_manager):
    raise ConnectionError('no route\nto the host')

  def _generate_examples(self):
    return {}


def _read(split, shuffle_files):
  del split, shuffle_files
  return tf.data.Dataset.range(3)


@pytest.fixture
def add_task():
  names = []

  def add(name, source):
    seqio.TaskRegistry.add(
      name,
      source=source,
      preprocessors=[],
      output_features=task_vocabulary.output_features(),
    )
    names.append(name)

  yield add
  for name in names:
    seqio.TaskRegistry.remove(name)


def test_what_cannot_be_fetched_is_one_line(add_task, tmp_path):
  add_task(
    'toy_broken_data',
    seqio.TfdsDataSource(
      'toy_broken:1.0.0', tfds_data_dir=str(tmp_path), splits=['train']
    ),
  )
  with pytest.raises(UserError, match=r'toy_broken_data.*: no route') as error:
    preparation.prepare_data('toy_broken_data')
  assert '/toy_broken/1.0.0' in str(error.value)
  assert '\n' not in str(error.value)


def test_a_wrong_name_gets_the_nearest(add_task):
  add_task('toy_right', seqio.FunctionDataSource(_read, splits=['train']))
  with pytest.raises(UserError, match="did you mean 'toy_right'"):
    preparation.prepare_data('toy_rihgt')


def test_a_source_may_prepare_its_data_itself(
  add_task,
  tmp_path,
  vocabulary_file,  # noqa: F811
):
  class Source(seqio.FunctionDataSource):
    def prepare(self):
      (tmp_path / 'prepared').write_text('yes')

  add_task('toy_itself', Source(_read, splits=['train']))
  preparation.prepare_data('toy_itself')
  assert (tmp_path / 'prepared').exists()


def test_what_is_prepared_is_left_as_it_is(
  add_task,
  tfds_data_dir,  # noqa: F811
  vocabulary_file,  # noqa: F811
):
  prepared = seqio.TfdsDataSource('gsm8k:1.0.0', splits=['train'])
  add_task('toy_prepared', prepared)
  before = _state(tfds_data_dir / 'gsm8k')
  preparation.prepare_data('toy_prepared')
  assert _state(tfds_data_dir / 'gsm8k') == before


def test_the_vocabulary_is_copied_once(
  tmp_path,
  monkeypatch,
  vocabulary_file,  # noqa: F811
):
  path = tmp_path / 'new' / 'sentencepiece.model'
  monkeypatch.setattr(vocabulary, 'PUBLIC_PATH', str(vocabulary_file))
  monkeypatch.setenv('DST_VOCABULARY', str(path))
  assert task_vocabulary.fetch() == str(path)
  assert path.read_bytes() == vocabulary_file.read_bytes()
  monkeypatch.setattr(vocabulary, 'PUBLIC_PATH', str(tmp_path / 'nowhere'))
  task_vocabulary.fetch()
  path.unlink()
  with pytest.raises(UserError, match=r'cannot copy the vocabulary .*nowhere'):
    task_vocabulary.fetch()
  monkeypatch.setenv('DST_VOCABULARY', 'bytes')
  assert task_vocabulary.fetch() == 'bytes'


def test_one_folder_stands_for_all_and_variables_go_first():
  environment = {'DST_DATA_DIR': '/shared', 'SACREBLEU': '/elsewhere'}
  data_folders.set_variables(environment)
  assert environment == {
    'DST_DATA_DIR': '/shared',
    'TFDS_DATA_DIR': '/shared/tensorflow_datasets',
    'SACREBLEU': '/elsewhere',
    'DST_VOCABULARY': '/shared/sentencepiece.model',
  }
  environment = {'DST_DATA_DIR': 'gs://bucket/data'}
  data_folders.set_variables(environment)
  assert environment == {
    'DST_DATA_DIR': 'gs://bucket/data',
    'TFDS_DATA_DIR': 'gs://bucket/data/tensorflow_datasets',
    'DST_VOCABULARY': 'gs://bucket/data/sentencepiece.model',
  }
  environment = {}
  data_folders.set_variables(environment)
  assert not environment


def _state(folder):
  """Returns every file's path, mode, size and time."""
  return {
    path: (found.st_mode, found.st_size, found.st_mtime_ns)
    for path in sorted(folder.rglob('*'))
    for found in [path.stat()]
  }


@pytest.mark.slow
def test_a_folder_is_prepared_and_then_only_read(
  tfds_data_dir,  # noqa: F811
  vocabulary_file,  # noqa: F811
  tmp_path,
):
  folder = tmp_path / 'data'
  downloads = folder / 'tensorflow_datasets' / 'downloads'
  shutil.copytree(tfds_data_dir / 'downloads', downloads)
  shutil.copy(vocabulary_file, folder / 'sentencepiece.model')
  environment = {
    'DST_DATA_DIR': str(folder),
    'DST_VOCABULARY': str(folder / 'sentencepiece.model'),
  }
  umask = os.umask(0o077)
  try:
    commands.run('prepare_data', 'gsm8k', environment=environment)
  finally:
    os.umask(umask)
  for path in (folder, *folder.rglob('*')):
    mode = path.stat().st_mode
    assert mode & stat.S_IROTH, path
    assert mode & stat.S_IXOTH or not path.is_dir(), path
  shutil.rmtree(downloads)
  before = _state(folder)
  commands.run(
    'train',
    '--gin_file=gin/models/t5_1_1_tiny.gin',
    '--gin_file=gin/tasks/gsm8k.gin',
    '--gin_file=gin/runs/pretrain.gin',
    "--gin.TASK_FEATURE_LENGTHS={'inputs': 32, 'targets': 16}",
    f'--gin.MODEL_DIR={tmp_path / "run"}',
    '--gin.TRAIN_STEPS=20',
    '--gin.BATCH_SIZE=2',
    '--gin.EVAL_EXAMPLES=5',
    '--gin.EVAL_BATCH_SIZE=4',
    environment=environment,
  )
  assert _state(folder) == before
  last = (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()[-1]
  assert 0 <= json.loads(last)['gsm8k/strict_match'] <= 100
