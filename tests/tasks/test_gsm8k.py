"""GSM8K: what the model reads, writes, and how its answers are scored."""

from collections import Counter
import decimal
import json
import re

from fixtures_data import gsm8k_task  # noqa: F401
from fixtures_data import tfds_data_dir  # noqa: F401
from fixtures_data import vocabulary_file  # noqa: F401
import hypothesis
from hypothesis import strategies as st
import pytest
import seqio
import tensorflow as tf

from dst_t5x.tasks import gsm8k

_ROWS = {'train': 7473, 'test': 1319}
_LENGTHS = {
  'gsm8k': {'inputs': 256, 'targets': 320},
  'gsm8k_notes': {'inputs': 256, 'targets': 384},
}


def _read(task):
  """Returns every example of both splits, uncut, as numpy dicts."""
  return {
    split: list(
      task.get_dataset(
        None, split=split, shuffle=False, try_in_mem_cache=False
      ).as_numpy_iterator()
    )
    for split in _ROWS
  }


@pytest.fixture(scope='module')
def rows(gsm8k_task):  # noqa: F811
  """Every row, without the calculator's notes."""
  return _read(gsm8k_task)


@pytest.fixture(scope='module')
def rows_with_notes(gsm8k_task):  # noqa: F811
  """Every row, with the calculator's notes."""
  return _read(seqio.TaskRegistry.get(gsm8k.NOTES_NAME))


@pytest.fixture(scope='module')
def rows_of(rows, rows_with_notes):
  return {'gsm8k': rows, 'gsm8k_notes': rows_with_notes}


def _rewrite(text, notes=False):
  return gsm8k.rewrite(tf.constant(text), notes).numpy().decode()


@pytest.mark.parametrize(
  ('text', 'strict', 'flexible'),
  [
    ('She has 3 | #### 72', '72', '72'),
    ('She has 3\n#### 1,080', '1080', '1080'),
    ('#### 5.0', '5', '5'),
    ('#### 0.50', '0.5', '0.5'),
    ('#### $18.', '18', '18'),
    ('#### -4', '-4', '-4'),
    ('####7', '7', '7'),
    ('#### 100', '100', '100'),
    ('#### 109,200,000', '109200000', '109200000'),
    ('The answer is $1,234.50.', None, '1234.5'),
    ('It is 10-5', None, '5'),
    ('It is 10 - -5', None, '-5'),
    ('It costs $.5', None, '0.5'),
    ('It is -$3', None, '-3'),
    ('He has 3, 4, and 12, so', None, '12'),
    ('#### 4 | #### 6', '4', '6'),
    ('#### none, but 8', None, '8'),
    ('There is nothing.', None, None),
    ('', None, None),
  ],
)
def test_extraction(text, strict, flexible):
  assert gsm8k.extract_strict(text) == strict
  assert gsm8k.extract_flexible(text) == flexible


@pytest.mark.parametrize(
  ('written', 'expected'),
  [
    ('−5', '-5'),  # U+2212 and other dashes of Unicode.
    ('–5', '-5'),
    ('‑5', '-5'),
    ('－５', '-5'),
    ('-€5', '-5'),
    ('£-5.50', '-5.5'),
    ('٣٤', '34'),
    ("1'080", '1080'),
    ('1’080.25', '1080.25'),
    ('1_080_000', '1080000'),
    ('1\xa0080', '1080'),
    ('12\u202f080', '12080'),
    ('1.080.000', '1080000'),
    ('1,00,000', '100000'),
    ('1{,}080', '1080'),
    (r'1\,080', '1080'),
    (r'\$1{,}080', '1080'),
    (r'$\boxed{-72}$', '-72'),
    (r'\frac{3}{4}', '0.75'),
    ('**72**', '72'),
    ('(72)', '72'),
    ('= 72', '72'),
    ('≈72%', '72'),
    ('½', '0.5'),
    ('2½', '2.5'),
    ('-2 1/2', '-2.5'),
    ('4/8', '0.5'),
    ('2/6', '1/3'),
    ('1e3', '1000'),
    ('-1.5E-2', '-0.015'),
    ('0042', '42'),
    ('-0.0', '0'),
  ],
)
def test_a_number_is_the_same_however_it_is_written(written, expected):
  assert gsm8k.extract_strict(f'#### {written}') == expected
  assert gsm8k.extract_strict(f'#### {written} | #### 9') == expected
  assert gsm8k.extract_flexible(f'It was 7, and is {written}.') == expected


def test_after_the_marker_spaces_may_be_inside_of_a_number():
  for text, expected in [('1 080', '1080'), ('- 5', '-5'), ('- $ 5', '-5')]:
    assert gsm8k.extract_strict(f'#### {text}') == expected
  # Elsewhere they part numbers.
  assert gsm8k.extract_flexible('He has 1 080') == '80'
  assert gsm8k.extract_flexible('in all - 5 of them') == '5'


_UNIT = "01234567890123456789.,$-−–/⁄½\xa0\u202f '_#{}\\e٣５\ud800a|"


@hypothesis.settings(deadline=None)
@hypothesis.given(
  st.decimals(allow_nan=False, allow_infinity=False, places=3),
  st.sampled_from(['{:f}', '{:,f}', '${:,f}', '**{:f}**', '≈ {:,f}']),
  st.sampled_from(',_\xa0\u202f’'),
  st.sampled_from('-−–‑－'),
)
def test_every_decimal_is_read_exactly(number, form, apart, minus):
  written = form.format(number).replace(',', apart).replace('-', minus)
  for found in (
    gsm8k.extract_strict(f'#### {written}'),
    gsm8k.extract_flexible(f'It is {written}.'),
  ):
    assert decimal.Decimal(found) == number
    assert gsm8k.extract_strict(f'#### {found}') == found


@hypothesis.settings(deadline=None)
@hypothesis.given(st.text(_UNIT, max_size=40))
def test_what_is_read_is_canonical(text):
  for found in (
    gsm8k.extract_strict(f'####{text}'),
    gsm8k.extract_flexible(text),
  ):
    if found is not None:
      assert re.fullmatch(r'-?(0|[1-9]\d*)(\.\d*[1-9]|/[1-9]\d*)?', found)
      assert gsm8k.extract_flexible(f'It is {found}') == found


def test_numbers_may_have_any_number_of_digits():
  long = '1' + '0' * 100_000
  assert gsm8k.extract_strict(f'#### {long}') == long
  assert gsm8k.extract_flexible(f'{long}/{long}') == long
  assert gsm8k.extract_strict('#### 1e999999999') is not None


@pytest.mark.parametrize(
  ('text', 'expected'),
  [
    ('48/2 = <<48/2=24>>24 clips.\n#### 24', '48/2 = 24 clips. | #### 24'),
    ('a \n\n b', 'a | b'),
    ('½ of 2½', '1/2 of 2 1/2'),
    ('¢25 and 5¢', '25 cents and 5 cents'),
    ('3×4÷2−1', '3*4/2-1'),
    ('20<30', '20 is less than 30'),
    ('√25 and 5^2', 'sqrt25 and 5**2'),
  ],
)
def test_rewriting(text, expected):
  assert _rewrite(text) == expected


def test_lines_can_be_read_again():
  text = 'One line.\nAnother one.\n#### 3'
  assert gsm8k.read_lines(_rewrite(text)) == text


def test_notes_can_be_kept_and_read_again():
  text = '48/2 = <<48/2=24>>24 clips.\n[1 + (30/60)] hours\n#### 24'
  written = _rewrite(text, notes=True)
  assert (
    written == '48/2 = [[48/2=24]]24 clips. | [1 + (30/60)] hours | #### 24'
  )
  assert gsm8k.read_lines(written) == text


def test_the_public_notes_are_all_kept(rows_with_notes, shared_data):
  for split, examples in rows_with_notes.items():
    texts = (shared_data / f'gsm8k/{split}.jsonl').read_text().splitlines()
    answers = {json.loads(text)['answer'] for text in texts}
    expected = Counter(n for a in answers for n in re.findall('<<.*?>>', a))
    written = {example['targets_pretokenized'].decode() for example in examples}
    found = Counter(
      note
      for text in written
      for note in re.findall('<<.*?>>', gsm8k.read_lines(text))
    )
    assert found == expected


@pytest.mark.parametrize('name', _LENGTHS)
def test_every_row_is_there(rows_of, name):
  assert {split: len(found) for split, found in rows_of[name].items()} == _ROWS


def test_validation_is_the_test_split(gsm8k_task, rows):  # noqa: F811
  assert gsm8k_task.num_input_examples('validation') == _ROWS['test']
  dataset = gsm8k_task.get_dataset(None, split='validation', shuffle=False)
  first = next(dataset.as_numpy_iterator())
  assert first['inputs'].tolist() == rows['test'][0]['inputs'].tolist()


@pytest.mark.parametrize('name', _LENGTHS)
def test_no_row_has_an_unknown_piece(rows_of, name):
  for examples in rows_of[name].values():
    for example in examples:
      assert 2 not in example['inputs'], example['inputs_pretokenized']
      assert 2 not in example['targets'], example['targets_pretokenized']


@pytest.mark.parametrize('name', _LENGTHS)
def test_nothing_is_cut_at_the_lengths_of_the_gin_file(
  rows_of, repository, name
):
  text = (repository / f'gin/tasks/{name}.gin').read_text()
  assert f'TASK_FEATURE_LENGTHS = {_LENGTHS[name]}' in text
  for examples in rows_of[name].values():
    for feature, length in _LENGTHS[name].items():
      longest = max(len(example[feature]) for example in examples)
      assert longest <= length


@pytest.mark.parametrize('name', _LENGTHS)
def test_pieces_give_the_text_and_its_answer_back(rows_of, gsm8k_task, name):  # noqa: F811
  pieces = gsm8k_task.output_features['targets'].vocabulary
  for examples in rows_of[name].values():
    for example in examples:
      text = example['targets_pretokenized'].decode()
      assert pieces.decode(example['targets'].tolist()) == text
      answer = text.split('#### ')[1].replace(',', '')
      assert float(gsm8k.extract_strict(text)) == float(answer)
      assert gsm8k.extract_flexible(text) == gsm8k.extract_strict(text)


def _score(task, predictions, targets):
  metrics = {}
  texts = [text.decode() for text in targets]
  answers = [task.postprocess_fn(text, is_target=True) for text in texts]
  outputs = [task.postprocess_fn(text, is_target=False) for text in predictions]
  for metric in task.metric_fns:
    metrics |= metric(answers, outputs)
  return metrics


def test_scores(rows, gsm8k_task):  # noqa: F811
  targets = [example['targets_pretokenized'] for example in rows['test']]
  perfect = [text.decode() for text in targets]
  assert _score(gsm8k_task, perfect, targets) == {
    'strict_match': 100.0,
    'flexible_extract': 100.0,
  }
  unmarked = [text.replace('####', 'so') for text in perfect]
  assert _score(gsm8k_task, unmarked, targets) == {
    'strict_match': 0.0,
    'flexible_extract': 100.0,
  }
  wrong = [re.sub(r'#### .*', '#### 0.25', text) for text in perfect[::2]]
  wrong += perfect[1::2]
  order = targets[::2] + targets[1::2]
  half = _score(gsm8k_task, wrong, order)
  assert half['strict_match'] == pytest.approx(100 * 659 / 1319)


def test_evaluator_gives_the_same_scores(gsm8k_task):  # noqa: F811
  evaluator = seqio.Evaluator(
    'gsm8k',
    feature_converter=seqio.EncDecFeatureConverter(pack=False),
    eval_split='test',
    sequence_length=_LENGTHS['gsm8k'],
    num_examples=32,
  )

  def perfect(dataset, model_feature_shapes=None):
    del model_feature_shapes
    return [
      (index, example['decoder_target_tokens'].tolist())
      for index, example in dataset.as_numpy_iterator()
    ]

  metrics, _ = evaluator.evaluate(
    compute_metrics=True, predict_fn=perfect, score_fn=None
  )
  assert metrics.result()['gsm8k'] == {
    'strict_match': 100.0,
    'flexible_extract': 100.0,
  }
