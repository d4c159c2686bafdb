"""The folder of a server's subsets: a user's own, or a copy of the Hub's."""

import pathlib

import hub_cache
from huggingface_hub import constants
import pytest
import seqio
import serving

from dst_t5x import subsets
from dst_t5x.core.errors import UserError
from dst_t5x.data import vocabulary
from dst_t5x.serving import networks
from dst_t5x.serving import subset_folders

_PATH = 'hf://some-lab/tuned'


@pytest.fixture
def files(tmp_path, monkeypatch):
  """Two subsets on the Hub, without a network."""
  monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'hub'))
  monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
  folder = hub_cache.repository(tmp_path / 'hub', 'some-lab/tuned')
  folder.mkdir()
  for i, name in enumerate(('a', 'b')):
    found, _ = serving.subset(0.01, i, serving.BYTES)
    subsets.save(folder / f'{name}.dst', found, {})
  return folder


def test_a_folder_stays_what_it_is(tmp_path):
  with subset_folders.opened(str(tmp_path)) as folder:
    assert folder == str(tmp_path)
  assert tmp_path.exists()


@pytest.mark.parametrize(
  ('path', 'names'),
  [(_PATH, ['a', 'b']), (f'{_PATH}@v1', ['a', 'b']), (f'{_PATH}/b.dst', ['b'])],
)
def test_the_server_works_in_a_copy_of_the_hub_s(files, path, names):
  blob = (files / 'b.dst').read_bytes()
  with subset_folders.opened(path) as folder:
    service = serving.service(folder)
    assert service.library.names() == names
    assert service.library.find('b').subset.size > 0
    service.library.add('c', blob)
    service.library.delete('b')
    service.scheduler.close()
  assert not pathlib.Path(folder).exists()
  assert sorted(file.name for file in files.iterdir()) == ['a.dst', 'b.dst']
  assert (files / 'b.dst').read_bytes() == blob


@pytest.mark.parametrize(
  ('path', 'message'),
  [
    (f'{_PATH}/c.dst', r'there is no subset c\.dst'),
    ('hf://some-lab/other', 'not in the cache of the Hub'),
    ('hf://some-lab', 'must be hf://organisation/name'),
  ],
)
def test_what_is_not_there(files, path, message):
  with (
    pytest.raises(UserError, match=message) as error,
    subset_folders.opened(path),
  ):
    pass
  assert '\n' not in str(error.value)


def test_a_seed_on_the_hub_has_its_own_tokenizer(tmp_path, monkeypatch):
  monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'hub'))
  monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
  monkeypatch.delenv(vocabulary.VOCABULARY_VARIABLE, raising=False)
  folder = hub_cache.repository(tmp_path / 'hub', 'some-lab/base')
  folder.mkdir()
  path = 'hf://some-lab/base'
  assert networks.vocabulary('bytes', path, False) == seqio.ByteVocabulary()
  assert networks.vocabulary(None, path, False) == vocabulary.chosen()
  (folder / 'tokenizer.json').write_text('{}')
  assert networks.vocabulary(None, path, False).folder == folder
