"""T5's vocabulary: the local copy, and what is said when there is none."""

import threading

from fixtures_data import vocabulary_file  # noqa: F401
import gin
import pytest
import seqio
import tensorflow as tf

from dst_t5x.core.errors import UserError
from dst_t5x.data import task_vocabulary
from dst_t5x.data import vocabulary


def _with(monkeypatch, path):
  monkeypatch.setenv('DST_VOCABULARY', str(path))
  return vocabulary.chosen()


def test_local_file_gives_the_32100_pieces_of_t5(
  monkeypatch,
  vocabulary_file,  # noqa: F811
):
  pieces = _with(monkeypatch, vocabulary_file)
  task_vocabulary.check(pieces)
  assert pieces.vocab_size == 32_100
  assert (pieces.pad_id, pieces.eos_id, pieces.unk_id) == (0, 1, 2)
  assert pieces.encode('<extra_id_0>') == [32_099]
  assert pieces.decode(pieces.encode('It is 12.')) == 'It is 12.'


def test_without_the_variable_the_public_path_is_used(monkeypatch):
  monkeypatch.delenv('DST_VOCABULARY', raising=False)
  path = vocabulary.chosen().sentencepiece_model_file
  assert path == vocabulary.PUBLIC_PATH


def test_missing_file_names_the_path_and_the_remedy(monkeypatch, tmp_path):
  pieces = _with(monkeypatch, tmp_path / 'none.model')
  with pytest.raises(UserError, match=r'none\.model.*DST_VOCABULARY') as error:
    task_vocabulary.check(pieces)
  assert '\n' not in str(error.value)


def test_file_of_another_kind_is_refused(monkeypatch, tmp_path):
  path = tmp_path / 'text.model'
  path.write_text('this is not a SentencePiece model')
  with pytest.raises(UserError, match=r'text\.model.*DST_VOCABULARY'):
    task_vocabulary.check(_with(monkeypatch, path))


def test_slow_storage_does_not_hold_up_the_run(monkeypatch, tmp_path):
  pieces = _with(monkeypatch, tmp_path / 'slow.model')
  monkeypatch.setattr(task_vocabulary, '_SECONDS_TO_LOAD', 0.05)
  released = threading.Event()
  monkeypatch.setattr(pieces, 'load_model', released.wait)
  with pytest.raises(UserError, match='no answer'):
    task_vocabulary.check(pieces)
  released.set()


def test_vocabularies_without_a_file_need_no_check():
  task_vocabulary.check(seqio.ByteVocabulary())


@pytest.fixture
def by_gin():
  """Chooses a vocabulary as a gin file does, after tasks were registered."""
  return lambda name: gin.bind_parameter('vocabulary.chosen.name', name)


def test_gin_goes_before_the_variable(monkeypatch, tmp_path, by_gin):
  _with(monkeypatch, tmp_path / 'variable.model')
  by_gin(str(tmp_path / 'gin.model'))
  path = vocabulary.chosen().sentencepiece_model_file
  assert path == str(tmp_path / 'gin.model')


def test_bytes_can_be_chosen_after_a_task_was_registered(by_gin):
  features = task_vocabulary.output_features()
  by_gin('bytes')
  pieces = features['targets'].vocabulary
  task_vocabulary.check(pieces)
  assert pieces.vocab_size == 259
  assert pieces == seqio.ByteVocabulary()
  text = 'Äpfel {x} ~ 5\n'
  ids = pieces.encode(text)
  assert ids == [byte + 3 for byte in text.encode()]
  assert pieces.encode_tf(tf.constant(text)).numpy().tolist() == ids
  assert pieces.decode([*ids, 1, 77]) == text
  assert pieces.decode_tf(tf.constant([ids])).numpy()[0].decode() == text


def test_tasks_use_what_is_chosen_like_the_vocabulary_itself(
  monkeypatch,
  vocabulary_file,  # noqa: F811
):
  itself = _with(monkeypatch, vocabulary_file)
  pieces = task_vocabulary.TaskVocabulary()
  text = 'It is 12 <extra_id_7>'
  ids = itself.encode(text)
  for name in ('pad_id', 'eos_id', 'unk_id', 'bos_id', 'extra_ids',
               'vocab_size'):  # fmt: skip
    assert getattr(pieces, name) == getattr(itself, name), name
  assert pieces.encode(text) == ids
  assert pieces.encode_tf(tf.constant(text)).numpy().tolist() == ids
  for row in (ids, [*ids, 1, 5], [40_000, 2]):
    assert pieces.decode(row) == itself.decode(row)
    tensor = tf.constant([row])
    assert pieces.decode_tf(tensor).numpy() == itself.decode_tf(tensor).numpy()
  assert pieces == task_vocabulary.TaskVocabulary()
  assert pieces != seqio.ByteVocabulary()


def test_a_model_must_have_an_embedding_for_every_id(by_gin):
  by_gin('bytes')
  features = task_vocabulary.output_features()
  task_vocabulary.check_fits(features, 259)
  with pytest.raises(UserError, match=r'259 ids, but vocab_size .* is 256'):
    task_vocabulary.check_fits(features, 256)
