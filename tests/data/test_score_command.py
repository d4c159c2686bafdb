"""`python -m dst_t5x.score` equals SacreBLEU, and says what is missing."""

import json
import shutil
import subprocess
import sys

import pytest

from dst_t5x.core.errors import UserError
from dst_t5x.data import score_command
from dst_t5x.data import text_scores

_SYSTEM = ['A good day .', 'It rains cats.', 'No', 'The end of it all, then.']
_FIRST = ['A good day.', 'It rains.', 'No.', 'The end of it all.']
_SECOND = ['What a day.', 'It rains cats and dogs.', '', 'This is the end.']


def _write(path, lines):
  path.write_text(''.join(f'{line}\n' for line in lines))
  return str(path)


@pytest.fixture
def files(tmp_path):
  """A system's output and two references, a sentence a line."""
  named = {'system': _SYSTEM, 'first': _FIRST, 'second': _SECOND}
  return {
    name: _write(tmp_path / f'{name}.txt', lines)
    for name, lines in named.items()
  }


def _rows_of_eval():
  for prediction, *references in zip(_SYSTEM, _FIRST, _SECOND, strict=True):
    example = {
      'inputs': [1, 2],
      'inputs_pretokenized': 'x',
      'targets_pretokenized': references[0],
      'references': references,
    }
    yield {'input': example, 'target': references, 'prediction': prediction}


def _rows_of_infer():
  for prediction, *references in zip(_SYSTEM, _FIRST, _SECOND, strict=True):
    yield {
      'inputs': 'x',
      'targets': references[0],
      'references': references,
      'prediction': prediction,
    }


def _write_rows(path, rows):
  return _write(path, map(json.dumps, rows))


def _printed(capsys, *arguments):
  assert score_command.main(list(arguments)) == 0
  return capsys.readouterr().out.splitlines()


def _sacrebleu(files, *arguments):
  done = subprocess.run(
    [
      *(sys.executable, '-m', 'sacrebleu', files['first'], files['second']),
      *('-i', files['system'], '-m', 'bleu', 'chrf', '-w', '9', *arguments),
    ],
    capture_output=True,
    check=True,
    text=True,
  )
  return json.loads(done.stdout)


@pytest.mark.parametrize('language', ['', 'zh'])
def test_text_files_score_as_with_the_sacrebleu_command(
  files, tmp_path, capsys, language
):
  output = tmp_path / 'scores.json'
  references = ['--references', files['first'], files['second']]
  arguments = [*references, '--language', language, '--output', str(output)]
  lines = _printed(capsys, files['system'], *arguments)
  found = json.loads(output.read_text())
  assert found['count'] == 4
  expected = _sacrebleu(files, *(['-tok', language] if language else []))
  for line, name, theirs in zip(lines, ('bleu', 'chrf'), expected, strict=True):
    ours = found[name]
    assert ours['value'] == pytest.approx(theirs['score'], abs=1e-8)
    assert ours['signature'] == theirs['signature']
    assert line == f'{name} {theirs["score"]:.2f}  {theirs["signature"]}'
  assert f'tok:{language or "13a"}' in lines[0]
  assert 'nrefs:2' in lines[0]


@pytest.mark.parametrize('rows', [_rows_of_eval, _rows_of_infer])
def test_rows_of_eval_and_infer_bring_their_references(
  files, tmp_path, capsys, rows
):
  path = _write_rows(tmp_path / 'rows.jsonl', rows())
  references = ['--references', files['first'], files['second']]
  expected = _printed(capsys, files['system'], *references)
  assert _printed(capsys, path) == expected
  # Other references replace those in the rows.
  one = _printed(capsys, path, '--references', files['first'])
  assert 'nrefs:1' in one[0]
  assert _printed(capsys, path, '--metrics', 'chrf') == expected[1:]


@pytest.mark.parametrize(
  'row',
  [
    {'inputs': 'x', 'targets': 'The end.', 'prediction': 'The end.'},
    {
      'input': {'targets': [3, 1], 'targets_pretokenized': 'The end.'},
      'target': '7',
      'prediction': 'The end.',
    },
  ],
)
def test_tasks_without_references_are_scored_against_their_targets(
  tmp_path, row
):
  path = _write_rows(tmp_path / 'rows.jsonl', [row])
  assert score_command.read_predictions(path) == (['The end.'], [['The end.']])


@pytest.mark.parametrize(
  ('references', 'expected'),
  [
    ({'references': 'S'}, ['S']),
    ({'references': ['S', 'T']}, ['S', 'T']),
    ({'targets': 'S'}, ['S']),
    ({'targets': ['S', 'T']}, ['S', 'T']),
    ({'targets': [3, 1], 'targets_pretokenized': 'S'}, ['S']),
    ({'targets': 'T', 'references': ['S']}, ['S']),
    ({'input': 'a question', 'targets': 'S'}, ['S']),
    ({'input': {'references': 'S'}, 'target': ['S']}, ['S']),
    ({'references': None}, "'references' that is neither text nor a list"),
    ({'references': []}, "'references' that is neither text nor a list"),
    ({'references': {'a': 'S'}}, "'references' that is neither text nor"),
    ({'references': ['S', None]}, "'references' that is not text in quotes"),
    ({'targets': None}, "'targets' that is neither text nor a list"),
    ({'targets': 5}, "'targets' that is neither text nor a list"),
    ({'targets': '\ud83d'}, "half a character in 'targets'"),
    ({'input': {'targets': None}}, "'targets' that is neither text nor"),
    ({'target': 'S'}, "no 'targets'; did you mean 'target'?"),
    ({'Targets': 'S'}, "no 'targets'; did you mean 'Targets'?"),
    ({'reference': 'S'}, "no 'references'; did you mean 'reference'?"),
    ({'id': 1}, 'has no references'),
    ({'input': {'targets': [3, 1]}, 'target': '7'}, 'has no references'),
  ],
)
def test_references_are_texts_under_their_names(
  files, tmp_path, capsys, references, expected
):
  rows = [{'prediction': 'x'} | references] * 4
  path = _write_rows(tmp_path / 'rows.jsonl', rows)
  if isinstance(expected, list):
    assert score_command.read_predictions(path) == (['x'] * 4, [expected] * 4)
  else:
    assert score_command.main([path]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f'error: {path}')
    assert expected in line
  # Whatever they are, those of a file replace them.
  assert score_command.main([path, '--references', files['first']]) == 0


def test_a_mark_and_the_ends_of_lines_change_no_score(files, tmp_path, capsys):
  expected = _printed(capsys, files['system'], '--references', files['first'])
  for name, lines in (('system', _SYSTEM), ('first', _FIRST)):
    content = ''.join(f'{line}\r\n' for line in lines)
    (tmp_path / f'{name}.win').write_bytes(content.encode('utf-8-sig'))
  system, first = str(tmp_path / 'system.win'), str(tmp_path / 'first.win')
  for texts in (system, files['system']):
    for references in (first, files['first']):
      assert _printed(capsys, texts, '--references', references) == expected
  (tmp_path / 'cr.txt').write_bytes(b'a\rb\nc\n')
  assert score_command.read_predictions(str(tmp_path / 'cr.txt'))[0] == [
    'a\rb',
    'c',
  ]


def test_lines_end_only_where_they_should(tmp_path):
  path = _write(tmp_path / 'x.txt', ['a\u2028b', 'c\x0bd', 'e'])
  assert score_command.read_predictions(path) == (
    ['a\u2028b', 'c\x0bd', 'e'],
    None,
  )


def test_sentences_may_differ_in_their_number_of_references():
  found = text_scores.bleu()(['a b c d', 'e f g h'], [['a b c d'], ['x', 'e']])
  assert 'nrefs:var' in found.signature


_GOOD = {'prediction': 'x', 'targets': 'x'}


@pytest.mark.parametrize(
  ('lines', 'expected'),
  [
    ([], ['is empty']),
    (['{"prediction": 3'], ['rows.jsonl:1', 'not JSON']),
    ([json.dumps(_GOOD), '[]'], ['rows.jsonl:2', 'is not an object in braces']),
    (['{"prediction": 3}'], ['rows.jsonl:1', 'not text but 3', '`eval`']),
    (['{"prediction": "x"}'], ['no references', '--references']),
    (
      [json.dumps(_GOOD), '{"prediction": "x"}'],
      ['only some rows have references, 1 of 2 have none'],
    ),
    (['', ' '], ['is empty']),
    (['{"prediction": "x", "a": ' + '[' * 5000], ['jsonl:1 nests too deeply']),
    (
      ['{"prediction": "x", "prediction": "y"}'],
      ["has 'prediction' more than"],
    ),
    (['{"predictions": "x"}'], ["no 'prediction'; did you mean 'predictions'"]),
  ],
)
def test_malformed_files_are_one_line(tmp_path, capsys, lines, expected):
  path = _write(tmp_path / 'rows.jsonl', lines)
  assert score_command.main([path]) == 1
  (line,) = capsys.readouterr().err.splitlines()
  for part in ['error: ', path, *expected]:
    assert part in line


def test_missing_and_shorter_files_are_one_line(files, tmp_path, capsys):
  short = _write(tmp_path / 'short.txt', _FIRST[:3])
  none = str(tmp_path / 'none.txt')
  for references, expected in [
    ([files['first'], short], f'{short} has 3 lines, but {files["first"]} 4'),
    ([short], '4 predictions, but 3 references'),
    ([none], f'cannot read {none}'),
  ]:
    assert (
      score_command.main([files['system'], '--references', *references]) == 1
    )
    (line,) = capsys.readouterr().err.splitlines()
    assert expected in line


_SENTENCES = {
  'zh': '我们今天早上去学校学习。',
  'ja': '今日は朝から学校に行きます。',
  'th': 'วันนี้เราไปโรงเรียน',
  'km': 'ថ្ងៃនេះយើងទៅសាលារៀន',
  'my': 'ဒီနေ့ကျောင်းသွားတယ်။',
  'de': 'Wir gehen heute früh zur Schule .',
}


@pytest.mark.parametrize(
  ('language', 'tokenizer'),
  [
    ('', '13a'),
    *[(code, 'zh') for code in ('zh', 'ZH', 'zh-CN', 'zh_TW', 'zho', 'cmn')],
    *[(code, 'zh') for code in ('zho_Hans', 'Chinese', 'yue', 'cantonese')],
    *[(code, 'ja-mecab') for code in ('ja', 'jpn', 'ja_JP', 'Japanese')],
    *[(code, 'ko-mecab') for code in ('ko', 'kor', 'ko-KR')],
    *[(code, 'char') for code in ('th', 'tha', 'Thai', 'lo', 'km', 'my', 'bo')],
    *[(code, '13a') for code in ('de', 'ger', 'pt-BR', 'ace', 'zh-Latn')],
  ],
)
def test_the_tokenizer_goes_by_the_script_of_the_language(language, tokenizer):
  assert text_scores.tokenizer_for(language) == tokenizer


@pytest.mark.parametrize('language', ['en-zh', 'Chinesisch', 'x', '5', 'zh zh'])
def test_a_language_that_there_is_not_is_one_line(files, capsys, language):
  arguments = ['--references', files['first'], '--language', language]
  assert score_command.main([files['system'], *arguments]) == 1
  captured = capsys.readouterr()
  assert not captured.out
  (line,) = captured.err.splitlines()
  assert f'no language is called {language!r}' in line


@pytest.mark.parametrize('language', ['zh', 'zh-CN', 'th', 'km', 'my', 'de'])
def test_equal_texts_have_a_score_of_100_in_their_language(
  tmp_path, capsys, language
):
  text = _SENTENCES[language[:2]]
  rows = [{'prediction': text, 'targets': text}]
  path = _write_rows(tmp_path / 'rows.jsonl', rows)
  line, _ = _printed(capsys, path, '--language', language)
  assert line.startswith('bleu 100.00  ')
  assert f'tok:{text_scores.tokenizer_for(language)}|' in line


@pytest.mark.parametrize('language', _SENTENCES)
def test_scores_without_the_language_they_need_say_so(language, caplog):
  text = _SENTENCES[language]
  text_scores.bleu()([text], [[text, 'x']])
  warned = 'name their language' in caplog.text
  assert warned == (language != 'de')


def test_a_language_whose_tokenizer_is_not_installed_is_one_line(monkeypatch):
  from sacrebleu.tokenizers import tokenizer_ja_mecab

  monkeypatch.setattr(tokenizer_ja_mecab, 'MeCab', None)
  with pytest.raises(UserError, match=r'pip install sacrebleu\[ja\]') as error:
    text_scores.bleu('ja')
  assert '\n' not in str(error.value)


def test_missing_bleurt_package_and_checkpoint_are_one_line(
  files, tmp_path, capsys, monkeypatch
):
  arguments = [files['system'], '--references', files['first']]
  arguments += ['--metrics', 'bleu', 'bleurt']
  monkeypatch.delenv('BLEURT_CHECKPOINT', raising=False)
  monkeypatch.setitem(sys.modules, 'bleurt', None)
  assert score_command.main(arguments) == 1
  captured = capsys.readouterr()
  assert not captured.out  # Nothing is computed in vain.
  (line,) = captured.err.splitlines()
  assert "BLEURT needs the package 'bleurt': pip install" in line

  (tmp_path / 'package' / 'bleurt').mkdir(parents=True)
  (tmp_path / 'package' / 'bleurt' / '__init__.py').write_text('')
  monkeypatch.syspath_prepend(tmp_path / 'package')
  monkeypatch.delitem(sys.modules, 'bleurt')
  for more, expected in [
    ([], 'BLEURT needs a checkpoint: unpack https'),
    (['--bleurt_checkpoint', str(tmp_path)], 'no BLEURT checkpoint'),
  ]:
    assert score_command.main(arguments + more) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert expected in line
    assert 'BLEURT-20' in line
  monkeypatch.delitem(sys.modules, 'bleurt', raising=False)


def _make_checkpoint(folder, pieces):
  """Saves a BLEURT checkpoint: the candidate's share of all pieces."""
  import tensorflow as tf

  names = ('input_ids', 'input_mask', 'segment_ids')

  class Share(tf.Module):
    @tf.function(
      input_signature=[
        tf.TensorSpec([None, None], tf.int64, name) for name in names
      ]
    )
    def serve(self, input_ids, input_mask, segment_ids):
      del input_ids
      return {
        'predictions': tf.cast(
          tf.reduce_sum(segment_ids, 1) / tf.reduce_sum(input_mask, 1),
          tf.float32,
        )
      }

  module = Share()
  tf.saved_model.save(
    module, str(folder), signatures={'serving_default': module.serve}
  )
  shutil.copy(pieces, folder / 'pieces.model')
  (folder / 'pieces.vocab').write_text('')
  settings = {
    'name': 'share',
    'vocab_file': None,
    'sp_model': 'pieces',
    'do_lower_case': False,
    'max_seq_length': 64,
  }
  (folder / 'bleurt_config.json').write_text(json.dumps(settings))


def test_bleurt_is_the_packages_average_against_the_first_reference(
  tmp_path, shared_data
):
  bleurt = pytest.importorskip('bleurt.score', exc_type=ImportError)
  folder = tmp_path / 'BLEURT-share'
  _make_checkpoint(folder, next((shared_data / 'vocab').glob('*.model')))
  references = list(zip(_FIRST, _SECOND, strict=True))
  found = text_scores.bleurt(str(folder), batch_size=3)(_SYSTEM, references)
  expected = bleurt.BleurtScorer(str(folder)).score(
    references=_FIRST, candidates=_SYSTEM
  )
  assert found.value == pytest.approx(100 * sum(expected) / 4)
  assert 'checkpoint:BLEURT-share' in found.signature
