"""WMT: the sentences, their order, and scores that equal SacreBLEU's own."""

import hashlib
import json
import os
import random
import re
import subprocess
import sys

import commands
from fixtures_data import vocabulary_file  # noqa: F401
from fixtures_wmt import real_lines
from fixtures_wmt import sacrebleu_folder  # noqa: F401
from fixtures_wmt import write_set
import gin
import pytest
import seqio
import tensorflow as tf

from dst_t5x.config import binaries
from dst_t5x.core.errors import UserError
from dst_t5x.data import task_checks
from dst_t5x.data import task_examples
from dst_t5x.runs import evaluating as eval_binary
from dst_t5x.runs import inference
from dst_t5x.tasks import sacrebleu_data
from dst_t5x.tasks import wmt

_LENGTHS = {'inputs': 192, 'targets': 192}
_PERCENT_CUT = 0.5
_SPLITS = ('train', 'validation', 'test')


@pytest.fixture(scope='module')
def task(sacrebleu_folder, vocabulary_file):  # noqa: F811
  return task_checks.check('wmt22_de_en', _LENGTHS, 8)


def _examples(task, split):
  dataset = task.get_dataset(
    None, split=split, shuffle=False, try_in_mem_cache=False
  )
  return list(dataset.as_numpy_iterator())


def _order(split='train', **options):
  source = seqio.TaskRegistry.get('wmt22_de_en').source
  dataset = source.get_dataset(split, **options)
  return [row['source'].decode() for row in dataset.as_numpy_iterator()]


def _python(code, environment):
  return subprocess.run(
    [sys.executable, '-c', code],
    env=os.environ | environment,
    capture_output=True,
    text=True,
    timeout=commands.TIMEOUT,
  )


def test_the_sets_for_training_add_up_to_the_papers_number():
  assert sum(wmt.SIZES[name] for name in wmt.TRAIN_SETS) == 31_480
  for name in wmt.SIZES:
    # Raises where SacreBLEU has no such set, or not in this direction.
    sacrebleu_data.is_there(name, 'de-en')


def test_test_split_is_every_sentence_with_both_references(task, shared_data):
  source, first, second = (
    real_lines(shared_data, f'generaltest2022.de-en.{part}')
    for part in ('src.de', 'ref.A.en', 'ref.B.en')
  )
  examples = _examples(task, 'test')
  assert len(examples) == 1984 == task.num_input_examples('test')
  for example, german, *english in zip(
    examples, source, first, second, strict=True
  ):
    expected = f'translate German to English: {german}'
    assert example['inputs_pretokenized'].decode() == expected
    assert example['targets_pretokenized'].decode() == english[0]
    assert [text.decode() for text in example['references']] == english
    assert example['inputs'][-1] == example['targets'][-1] == 1


def test_prefix_is_the_one_of_t5(task):
  from t5.data import preprocessors

  row = _examples(task, 'test')[0]
  translated = preprocessors.translate(
    tf.data.Dataset.from_tensors({'de': 'Das ist gut.', 'en': 'x'}), 'de', 'en'
  )
  (expected,) = translated.as_numpy_iterator()
  prefix = expected['inputs'].decode().removesuffix('Das ist gut.')
  assert row['inputs_pretokenized'].decode().startswith(prefix)
  assert wmt.prefix('en-cs') == 'translate English to Czech: '


def test_validation_is_the_same_500_sentences_always(task, shared_data):
  source, first, second = (
    real_lines(shared_data, f'newstest2021.de-en.{part}')
    for part in ('src.de', 'ref.A.en', 'ref.B.en')
  )
  numbers = wmt.sample(500, 1000)
  assert numbers == sorted(set(numbers))
  assert (
    hashlib.sha256(str(numbers).encode()).hexdigest().startswith('9b60888df005')
  )
  examples = _examples(task, 'validation')
  assert len(examples) == 500
  for example, i in zip(examples, numbers, strict=True):
    assert example['inputs_pretokenized'].decode().endswith(source[i])
    english = [text.decode() for text in example['references']]
    assert english == [first[i], second[i]]


def test_training_sentences_come_mixed_and_each_once(task):
  in_order = _order(shuffle=False)
  assert len(in_order) == 500 == task.num_input_examples('train')
  drawn = _order(shuffle=True, seed=3)
  assert drawn == _order(shuffle=True, seed=3)
  assert drawn != _order(shuffle=True, seed=4)
  assert sorted(drawn) == sorted(in_order)
  # The first sentences are from all over the sets, not from the first one.
  places = [in_order.index(text) for text in drawn[:20]]
  assert max(places) > 250


def test_no_sentence_is_for_training_and_validation(task):
  validation = set(_order('validation', shuffle=False))
  assert not validation & set(_order(shuffle=False))


def test_few_targets_are_cut_at_the_lengths_of_the_gin_file(task, repository):
  text = (repository / 'gin/tasks/wmt22_de_en.gin').read_text()
  assert f'TASK_FEATURE_LENGTHS = {_LENGTHS}' in text
  for split in _SPLITS:
    examples = _examples(task, split)
    for name, length in _LENGTHS.items():
      cut = sum(len(example[name]) > length for example in examples)
      assert 100 * cut / len(examples) <= _PERCENT_CUT


@pytest.fixture(scope='module')
def predictions(task):
  """Reference A, here and there with two words swapped or one left out."""
  draw = random.Random(7)
  texts = []
  for example in _examples(task, 'test'):
    words = example['targets_pretokenized'].decode().split()
    place = draw.randrange(len(words))
    if draw.random() < 0.5:
      words[place:] = words[place:][::-1]
    texts.append(' '.join(words[: place + 3]))
  return texts


def _score(task, predictions):
  (metric,) = task.metric_fns
  targets = [
    task.postprocess_fn('', example=example, is_target=True)
    for example in _examples(task, 'test')
  ]
  outputs = [task.postprocess_fn(text) for text in predictions]
  return metric(targets=targets, predictions=outputs)


def test_scores_and_signatures_are_those_of_the_sacrebleu_command(
  task, predictions, shared_data, tmp_path
):
  system = tmp_path / 'system.txt'
  system.write_text(''.join(f'{text}\n' for text in predictions))
  wmt_data = shared_data / 'wmt'
  references = [wmt_data / f'generaltest2022.de-en.ref.{x}.en' for x in 'AB']
  command = ['-m', 'sacrebleu', *references, '-i', system]
  done = subprocess.run(
    [sys.executable, *command, '-l', 'de-en', '-m', 'bleu', 'chrf', '-w', '9'],
    capture_output=True,
    check=True,
    text=True,
  )
  bleu, chrf = json.loads(done.stdout)
  found = _score(task, predictions)
  assert found['bleu'] == pytest.approx(bleu['score'], abs=1e-8)
  assert found['chrf'] == pytest.approx(chrf['score'], abs=1e-8)
  assert 20 < found['bleu'] < 90
  # The command names the test set's language pair too.
  kept = re.sub(r'lang:de-en\|', '', bleu['signature'])
  assert found['bleu_signature'].textdata == kept
  assert 'nrefs:2|case:mixed' in kept
  assert 'tok:13a' in kept
  kept = re.sub(r'lang:de-en\|', '', chrf['signature'])
  assert found['chrf_signature'].textdata == kept


def test_either_reference_is_a_perfect_translation(task):
  for choice in (0, 1):
    perfect = [
      example['references'][choice].decode()
      for example in _examples(task, 'test')
    ]
    found = _score(task, perfect)
    assert found['bleu'] == pytest.approx(100)
    assert found['chrf'] == pytest.approx(100)


def test_decoded_rows_carry_their_references(task):
  rows = list(inference._of_split(task, _LENGTHS, 'test'))
  assert len(rows) == 1984
  assert len(rows[0]['references']) == 2
  assert rows[0]['references'][0] == rows[0]['targets']


def test_what_is_missing_is_one_line_before_training(tmp_path, monkeypatch):
  monkeypatch.setenv('SACREBLEU', str(tmp_path))
  with pytest.raises(UserError) as error:
    sacrebleu_data.read('wmt14/full', 'de-en')
  for part in (str(tmp_path), 'SACREBLEU', 'prepare_data', 'wmt14_full.de-en'):
    assert part in str(error.value)
  assert '\n' not in str(error.value)
  task = seqio.TaskRegistry.get('wmt22_de_en')
  # Other tests read it where it is not missing.
  task_examples._remembered.cache_clear()
  with pytest.raises(UserError, match='newssyscomb2009'):
    task_checks._check_first_examples(task, _LENGTHS, 'train')


@pytest.mark.parametrize(
  ('name', 'pair', 'expected'),
  [
    ('wmt2', 'de-en', "no set 'wmt2'; did you mean 'wmt2"),
    ('wmt22', 'de-es', "'wmt22' of SacreBLEU has no pair 'de-es'.* de-fr"),
    ('newssyscomb2009', 'de-fr', 'no pair'),
  ],
)
def test_unknown_sets_and_pairs_are_named(name, pair, expected):
  with pytest.raises(UserError, match=expected):
    sacrebleu_data.read(name, pair)


def test_files_of_different_lengths_are_refused(tmp_path, monkeypatch):
  monkeypatch.setenv('SACREBLEU', str(tmp_path))
  write_set(tmp_path, 'wmt21', src=['eins', 'zwei'], ref=['one'])
  with pytest.raises(UserError, match=r'\.ref has 1 lines, but .*\.src 2'):
    sacrebleu_data.read('wmt21', 'de-en')


def test_a_copy_of_the_first_reference_is_not_another_one(
  tmp_path, monkeypatch
):
  monkeypatch.setenv('SACREBLEU', str(tmp_path))
  write_set(tmp_path, 'wmt21', src=['eins'], ref=['one'], ref__A=['one'])
  assert sacrebleu_data.read('wmt21', 'de-en').references == [('one',)]


_SGM = '<doc docid="d" origlang="de">\n{}</doc>\n'
_XML = """<dataset id="d"><doc origlang="de" id="1">
<src lang="de"><p><seg id="1">Guten Tag.</seg></p></src>
<ref lang="en" translator="B"><p><seg id="1">Hi.</seg></p></ref>
<ref lang="en" translator="A"><p><seg id="1">Hello.</seg></p></ref>
<hyp system="X" language="en"><p><seg id="1">Good.</seg></p></hyp>
</doc></dataset>"""


def test_sets_are_fetched_by_sacrebleu_itself(tmp_path):
  """In a process of its own: SacreBLEU reads its folder's name only once.

  An archive that is there is not downloaded, nor unpacked, again.
  """
  raw = tmp_path / 'wmt09' / 'raw'
  for language, texts in {
    'de': ['Ja.', 'Nein.'],
    'en': ['Yes.', 'No.'],
  }.items():
    path = raw / 'test' / f'newstest2009-src.{language}.sgm'
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f'<seg id="{i}"> {text} </seg>\n' for i, text in enumerate(texts)]
    path.write_text(_SGM.format(''.join(lines)))
  (raw / 'wmt09.test.tgz').write_text('unpacked already')
  raw = tmp_path / 'newssyscomb2009' / 'raw'
  (raw / 'dev').mkdir(parents=True)
  (raw / 'dev' / 'newssyscomb2009.de').write_text('Gut.\n')
  (raw / 'dev' / 'newssyscomb2009.en').write_text('Good.\n')
  (raw / 'newssyscomb2009.dev.tgz').write_text('unpacked already')
  raw = tmp_path / 'wmt22' / 'raw'
  xml = raw / 'wmt22-news-systems-1.1/xml/wmttest2022.de-en.all.xml'
  xml.parent.mkdir(parents=True)
  xml.write_text(_XML)
  (raw / 'wmt22.v1.1.tar.gz').write_text('unpacked already')

  code = (
    'from dst_t5x.tasks import sacrebleu_data as sets\n'
    "for name in ('newssyscomb2009', 'wmt09', 'wmt22'):\n"
    "  sets.fetch(name, 'de-en')\n"
    "  print(*sets.read(name, 'de-en'))\n"
  )
  done = _python(code, {'SACREBLEU': str(tmp_path)})
  assert done.stdout.splitlines() == [
    "['Gut.'] [('Good.',)]",
    "['Ja.', 'Nein.'] [('Yes.',), ('No.',)]",
    "['Guten Tag.'] [('Hello.', 'Hi.')]",
  ], done.stderr


def test_a_folder_that_nobody_may_write_to_is_enough(
  sacrebleu_folder,  # noqa: F811
):
  before = sorted(sacrebleu_folder.rglob('*'))
  assert len(sacrebleu_data.read('wmt22', 'de-en').sources) == 1984
  sacrebleu_data.fetch('wmt22', 'de-en')  # Finds everything there.
  assert sorted(sacrebleu_folder.rglob('*')) == before


def test_another_task_is_a_call_away():
  arguments = {
    'pair': 'cs-en',
    'train_sets': ['wmt17', 'wmt18'],
    'dev_set': 'wmt20',
    'test_set': 'wmt21',
  }
  assert wmt.add_task(**arguments) == 'wmt21_cs_en'
  try:
    assert wmt.add_task(**arguments) == 'wmt21_cs_en'
    with pytest.raises(UserError, match='give this one a name'):
      wmt.add_task(**arguments | {'dev_set': 'wmt19'})
    with pytest.raises(UserError, match="no pair 'cs-en'"):
      wmt.add_task(**arguments | {'train_sets': ['wmt19'], 'name': 'other'})
  finally:
    seqio.TaskRegistry.remove('wmt21_cs_en')


def test_a_gin_file_adds_a_task():
  files = ['models/t5_1_1_tiny', 'tasks/wmt', 'runs/eval']
  binaries.parse(
    [
      *(f'--gin_file=gin/{name}.gin' for name in files),
      '--gin.TEST_SET=wmt22',
      '--gin.CHECKPOINT_PATH=x',
      '--gin.EVAL_OUTPUT_DIR=y',
    ],
    eval_binary.evaluate,
  )
  decoder = gin.query_parameter('%DECODER').scoped_configurable_fn()
  assert decoder.num_beams == 4
  macro = gin.query_parameter('%MIXTURE_OR_TASK_NAME')
  name = macro.scoped_configurable_fn()
  try:
    assert name == 'wmt22_en_de'
    assert set(seqio.TaskRegistry.get(name).splits) == set(_SPLITS)
  finally:
    seqio.TaskRegistry.remove(name)


@pytest.mark.slow
def test_tiny_model_trains_evaluates_and_its_predictions_can_be_scored(
  sacrebleu_folder,  # noqa: F811
  vocabulary_file,  # noqa: F811
  tmp_path,
):
  del sacrebleu_folder, vocabulary_file  # Named by environment variables.
  commands.call(
    'train',
    '--gin_file=gin/models/t5_1_1_tiny.gin',
    '--gin_file=gin/tasks/wmt22_de_en.gin',
    '--gin_file=gin/runs/pretrain.gin',
    *commands.flags(
      TASK_FEATURE_LENGTHS={'inputs': 32, 'targets': 16},
      MODEL_DIR=tmp_path,
      TRAIN_STEPS=20,
      BATCH_SIZE=2,
      EVAL_EXAMPLES=5,
      EVAL_BATCH_SIZE=4,
      KEEP_BEST_BY='wmt22_de_en/bleu',
    ),
  )
  (written,) = (tmp_path / 'evaluation').glob('*metrics.jsonl')
  scores = json.loads(written.read_text())
  assert 0 <= scores['bleu'] < 20
  assert scores['bleu_signature'].startswith('nrefs:2|case:mixed|')
  assert scores['chrf_signature'].startswith('nrefs:2|case:mixed|')
  predictions = tmp_path / 'evaluation' / 'wmt22_de_en-000020.jsonl'
  assert len(predictions.read_text().splitlines()) == 5
  commands.run('score', predictions, '--output', tmp_path / 'scores.json')
  again = json.loads((tmp_path / 'scores.json').read_text())
  for name in ('bleu', 'chrf'):
    assert again[name]['value'] == pytest.approx(scores[name])
    assert again[name]['signature'] == scores[f'{name}_signature']
