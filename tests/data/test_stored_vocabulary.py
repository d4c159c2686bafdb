"""What is stored of a vocabulary does what seqio's does."""

from etils import epath
from fixtures_data import vocabulary_file  # noqa: F401
from fixtures_tokenizers import tokenizer_folders  # noqa: F401
import pytest
import seqio

from dst_t5x.core.errors import UserError
from dst_t5x.data import stored_vocabulary
from dst_t5x.data import vocabulary
from dst_t5x.data import vocabulary_files

_TEXTS = ('', 'upper: plum', ' Äpfel and  pears', 'one\ntwo')


def _stored(found, folder):
  content, model = vocabulary_files.content_of('t', found)
  content['vocab_size'] = found.vocab_size
  entry = stored_vocabulary.store(epath.Path(folder), content, model)
  return stored_vocabulary.StoredVocabulary(epath.Path(folder), entry)


@pytest.mark.parametrize('kind', ['bytes', 'gemma', 'llama3'])
@pytest.mark.parametrize('in_chat', [False, True])
def test_it_encodes_and_decodes_as_seqio(
  kind,
  in_chat,
  tokenizer_folders,  # noqa: F811
  tmp_path,
):
  if kind == 'bytes' and in_chat:
    return
  name = 'bytes' if kind == 'bytes' else str(tokenizer_folders(kind))
  found = vocabulary.chosen(name, in_chat)
  answers = found.answers if in_chat else found
  ours = _stored(answers, tmp_path)
  ours.check()
  assert ours.vocab_size == answers.vocab_size
  for text in _TEXTS:
    ids = list(answers.encode(text))
    if in_chat:
      with pytest.raises(UserError, match='no chat template'):
        ours.encode(text)
    else:
      assert ours.encode(text) == ids
    for more in ([], [answers.eos_id, *ids], [0, 5], [10**6]):
      if more == [10**6] and answers.unk_id is None:
        continue  # Neither knows it.
      assert ours.decode([*ids, *more]) == answers.decode([*ids, *more])


def test_t5s_sentinels_are_stored(vocabulary_file, tmp_path):  # noqa: F811
  found = vocabulary.chosen(str(vocabulary_file))
  ours = _stored(found, tmp_path)
  ids = [*found.encode('A plum'), 32_099, 32_000, 32_100, 32_127, 1, 5]
  assert ours.decode(ids) == found.decode(ids)
  assert ours.encode('A plum <extra_id_0>') == found.encode(
    'A plum <extra_id_0>'
  )


def test_others_cannot_be_stored(tmp_path):
  with pytest.raises(UserError, match="'t' is a PassThroughVocabulary, which"):
    _stored(seqio.PassThroughVocabulary(size=9), tmp_path)
