"""Language modelling on files of documents."""

import json

from fixtures_tokenizers import lines
from fixtures_tokenizers import tokenizer_folders  # noqa: F401
import gin
import numpy as np
import pytest
import seqio

from dst_t5x.core.errors import UserError
from dst_t5x.data import task_checks
from dst_t5x.data import vocabulary
from dst_t5x.tasks import jsonl  # noqa: F401
from dst_t5x.tasks import text  # noqa: F401

_LENGTHS = {'inputs': 1, 'targets': 16}


@pytest.fixture
def write(tmp_path, tokenizer_folders):  # noqa: F811
  """Names files by a pattern, and a tokenizer; returns the folder."""

  def write(files, pattern='*', kind='llama3'):
    for name, content in files.items():
      (tmp_path / name).write_bytes(
        content if isinstance(content, bytes) else content.encode()
      )
    gin.bind_parameter('text.settings.train_file', f'{tmp_path}/{pattern}')
    gin.bind_parameter('text.settings.eval_file', f'{tmp_path}/{pattern}')
    folder = str(tokenizer_folders(kind))
    gin.bind_parameter('vocabulary.chosen.name', folder)
    return tmp_path

  return write


def _rows(**options):
  task = seqio.TaskRegistry.get('text')
  dataset = task.get_dataset(_LENGTHS, split='validation', shuffle=False)
  return [
    (row['inputs'].tolist(), row['targets'].tolist())
    for row in dataset.as_numpy_iterator()
  ]


def test_documents_are_cut_and_nothing_is_lost(write):
  documents = ['\n'.join(lines()[:20]), 'Short.', '\r\n two  \n']
  rows = ''.join(json.dumps({'text': d, 'id': 1}) + '\n' for d in documents[1:])
  write({'a.txt': documents[0], 'b.jsonl': rows})
  task_checks.check('text', _LENGTHS, 2)
  ours = vocabulary.chosen()
  expected = [[*ours.encode(d), ours.eos_id] for d in documents]
  found, row_lengths = [], []
  for inputs, targets in _rows():
    if inputs:  # The row continues a document.
      assert inputs == found[-1][-1:]
      assert row_lengths[-1] == _LENGTHS['targets']
      found[-1] += targets
    else:
      found.append(targets)
    row_lengths.append(len(targets))
  assert found == expected
  assert max(row_lengths) == 16
  assert [ours.decode(ids) for ids in found] == documents
  assert seqio.TaskRegistry.get('text').num_input_examples('train') == 3


def test_a_document_of_a_row_and_one_token_more(write):
  write({'a.txt': 'x'}, kind='qwen3')
  ours = vocabulary.chosen()
  piece = 'a' if len(ours.encode('a a a')) == 3 else 'b'
  for count in (15, 16):  # With the end token a row, and a row and one.
    write({'a.txt': ' '.join([piece] * count)}, kind='qwen3')
    assert len(ours.encode(' '.join([piece] * count))) == count
    rows = _rows()
    assert [len(targets) for _, targets in rows] == [16, 1][: count - 14]
    assert rows[-1][1][-1] == ours.eos_id


def test_bytes_of_documents(write):
  write({'a.txt': 'Äb\n', 'b.jsonl': '{"text": "é"}\n{"text": "x"}\n'})
  task = seqio.TaskRegistry.get('text')
  assert task_checks.bytes_of(task, 'validation') == 4 + 2 + 1
  assert task_checks.bytes_of(seqio.TaskRegistry.get('jsonl'), 'train') is None


def test_identity_of_rows(write):
  folder = write({'a.txt': 'one', 'b.txt': 'two'})
  source = seqio.TaskRegistry.get('text').source
  before = source.rows_of('train')
  assert before['documents'] == 2
  assert source.list_shards('train') == [f'{folder}/a.txt', f'{folder}/b.txt']
  (folder / 'b.txt').write_text('three')
  assert source.rows_of('train') != before
  assert source.rows_of('train')['a.txt'] == before['a.txt']


def test_shards_and_order(write):
  write({'a.jsonl': ''.join(f'{{"text": "{i}"}}\n' for i in range(300))})
  source = seqio.TaskRegistry.get('text').source

  def read(**options):
    rows = source.get_dataset('train', **options).as_numpy_iterator()
    return [row['targets'].decode() for row in rows]

  shuffled = read(shuffle=True, seed=1)
  assert shuffled != read(shuffle=False) == [str(i) for i in range(300)]
  assert sorted(shuffled) == sorted(read(shuffle=False))
  shards = [
    read(shuffle=False, shard_info=seqio.ShardInfo(i, 2)) for i in range(2)
  ]
  assert np.ravel(np.transpose(shards)).tolist() == read(shuffle=False)


@pytest.mark.parametrize(
  ('files', 'pattern', 'message'),
  [
    ({}, '*.txt', r'TRAIN_FILE: there is no file .*\*\.txt'),
    ({}, 'no.txt', r'cannot read TRAIN_FILE .*no\.txt'),
    ({}, 'no.jsonl', r'cannot read TRAIN_FILE: .*no\.jsonl'),
    ({'a.md': 'x'}, '*', r'a\.md. must end in \.txt or \.jsonl'),
    ({'a.txt': ''}, '*', r'a\.txt. is empty'),
    ({'a.txt': b'a\nb\xff'}, '*', r'a\.txt. is not UTF-8 in line 2'),
    (
      {'a.jsonl': '{"text": "a"}\n{"txt": "b"}'},
      '*',
      "line 2 has no 'text'; did you mean 'txt'",
    ),
    ({'a.jsonl': '\n'}, '*', 'holds no row'),
  ],
)
def test_mistakes(write, files, pattern, message):
  write(files, pattern)
  with pytest.raises(UserError, match=message) as caught:
    task_checks.check('text', _LENGTHS, 2)
  assert '\n' not in str(caught.value)


def test_files_must_be_named():
  gin.bind_parameter('vocabulary.chosen.name', 'bytes')
  with pytest.raises(UserError, match=r'needs files: set --gin\.TRAIN_FILE=…'):
    task_checks.check('text', _LENGTHS, 2)


def test_held_out_documents_are_other_files_and_need_no_chat(write):
  folder = write({'a.txt': 'x', 'b.txt': 'yy'}, 'a.txt')
  gin.bind_parameter('text.held_out.file', f'{folder}/b.txt')
  gin.bind_parameter('vocabulary.chosen.chat_template', True)
  task = task_checks.check(
    'held_out_text', _LENGTHS, 2, 'validation', in_chat=False
  )
  ours = vocabulary.chosen().base
  (row,) = task.get_dataset(
    _LENGTHS, split='validation', shuffle=False
  ).as_numpy_iterator()
  assert row['targets'].tolist() == [*ours.encode('yy'), ours.eos_id]
  assert task_checks.bytes_of(task, 'test') == 2
  assert task_checks.rows_of(task, 'test')[task.name].keys() == {
    'documents',
    'b.txt',
  }


def test_documents_have_no_chat(write):
  write({'a.txt': 'x'})
  gin.bind_parameter('vocabulary.chosen.chat_template', True)
  with pytest.raises(UserError, match='CHAT_TEMPLATE has no effect on the inp'):
    task_checks.check('text', _LENGTHS, 2)
