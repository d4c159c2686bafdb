"""Every task as rows of decoder-only networks; losses against Hugging Face."""

import dataclasses
import json
import re

from decoder_only import peer
from decoder_only import random_params
from decoder_only import tiny
from fixtures_data import tfds_data_dir  # noqa: F401
from fixtures_super_glue import super_glue_data_dir  # noqa: F401
from fixtures_tokenizers import lines
from fixtures_tokenizers import tokenizer_folders  # noqa: F401
from fixtures_trivia_qa import trivia_qa_data_dir  # noqa: F401
from fixtures_wmt import sacrebleu_folder  # noqa: F401
import gin
import jax
import numpy as np
import pytest
import seqio

from dst_t5x.data import task_examples
from dst_t5x.data import task_vocabulary
from dst_t5x.engine import evaluation
from dst_t5x.engine import losses
from dst_t5x.engine import partitioning
from dst_t5x.models import decoding
from dst_t5x.tasks import demo  # noqa: F401
from dst_t5x.tasks import gsm8k  # noqa: F401
from dst_t5x.tasks import jsonl  # noqa: F401
from dst_t5x.tasks import study  # noqa: F401
from dst_t5x.tasks import super_glue  # noqa: F401
from dst_t5x.tasks import text  # noqa: F401
from dst_t5x.tasks import trivia_qa  # noqa: F401
from dst_t5x.tasks import wmt  # noqa: F401

_LENGTHS = {'inputs': 160, 'targets': 96}
_ROWS = 8
_IGNORED = -100
# Task -> the fixtures that prepare its data.
_TASKS = {
  'gsm8k': ['tfds_data_dir'],
  'gsm8k_notes': ['tfds_data_dir'],
  'trivia_qa_closed_book': ['trivia_qa_data_dir'],
  'trivia_qa_closed_book_full': ['trivia_qa_data_dir'],
  'wmt22_de_en': ['sacrebleu_folder'],
  'super_glue': ['super_glue_data_dir'],
  'jsonl': [],
  'text': [],
  'demo_pretrain': [],
  'demo_finetune': [],
  'study_pretrain': [],
  'study_finetune': [],
}


def test_these_are_all_tasks(repository):
  """Those of SuperGLUE are in its mixture; every gin file names one."""
  named = set()
  for path in (repository / 'gin' / 'tasks').glob('*.gin'):
    named |= set(
      re.findall(r"^MIXTURE_OR_TASK_NAME = '(.*)'", path.read_text(), re.M)
    )
  assert named <= set(_TASKS)
  assert len(named) > 8


@pytest.fixture
def use(request, tmp_path, tokenizer_folders):  # noqa: F811
  """Prepares a task and chooses a tokenizer; returns a task's members."""

  def use(task, kind, chat_template):
    for fixture in _TASKS[task]:
      request.getfixturevalue(fixture)
    is_bytes = task.startswith(('demo', 'study'))
    name = 'bytes' if is_bytes else str(tokenizer_folders(kind))
    gin.bind_parameter('vocabulary.chosen.name', name)
    gin.bind_parameter('vocabulary.chosen.chat_template', chat_template)
    rows, documents = tmp_path / 'rows.jsonl', tmp_path / 'documents.jsonl'
    with rows.open('w') as out:
      for line in lines()[::500]:
        row = dict(zip(('inputs', 'targets'), line.split(': '), strict=True))
        print(json.dumps(row), file=out)
    with documents.open('w') as out:
      for i in (10, 40, 50):
        print(json.dumps({'text': '\n'.join(lines()[i : 2 * i])}), file=out)
    gin.bind_parameter('jsonl.settings.train_file', str(rows))
    gin.bind_parameter('text.settings.train_file', str(documents))
    found = seqio.get_mixture_or_task(task)
    return [m for m in task_examples.tasks_of(found) if 'train' in m.splits]

  return use


def _network(task, family='smollm2'):
  chosen = task_vocabulary.of_feature(task.output_features['targets'])
  return tiny(
    family,
    vocab_size=chosen.vocab_size,
    eos_id=chosen.eos_id,
    begin_id=getattr(chosen, 'begin_id', None),
    context_length=512,
  )


def _examples(task, count, lengths=_LENGTHS):
  dataset = task_examples.read(task, lengths, 'train').take(count)
  return dataset.map(lambda row: {name: row[name] for name in lengths})


def _batch(network, dataset, pack, lengths=_LENGTHS):
  """Returns a batch of `_ROWS` rows, filled up with rows of zeros."""
  converter = network.feature_converter(pack)
  rows = list(converter(dataset, lengths).as_numpy_iterator())
  missing = [jax.tree.map(np.zeros_like, rows[0])] * (_ROWS - len(rows))
  return {k: np.stack([row[k] for row in [*rows, *missing]]) for k in rows[0]}


_sums = jax.jit(
  lambda network, params, batch: losses.Loss(z_loss=0.0).sums(
    network.logits(params, batch), network.targets(batch)
  ),
  static_argnums=0,
)


# Twelve tasks; and such as differ from others in a word or in a split.
_SLOW = ('super_glue', 'trivia_qa_closed_book_full', 'gsm8k_notes')


@pytest.mark.parametrize(
  'task',
  [
    pytest.param(task, marks=[pytest.mark.slow] * (task in _SLOW))
    for task in _TASKS
  ],
)
def test_loss_is_on_targets_only_packed_or_not(use, task):
  """With SmolLM2's tokens: what pads is what ends."""
  # Documents and bytes have no template.
  is_chat = not task.startswith(('demo', 'study', 'text'))
  members = use(task, 'smollm2', is_chat)
  assert members
  ends = 0
  for member in members:
    dataset = _examples(member, _ROWS)
    network = _network(member)
    single = _batch(network, dataset, pack=False)
    targets = network.targets(single)
    for i, example in enumerate(dataset.as_numpy_iterator()):
      features = {name: value[i] for name, value in single.items()}
      prompt = network.prompt(features)
      prompt = prompt[prompt != network.pad_id].tolist()
      inputs = example['inputs'].tolist()
      if inputs[-1:] == [network.eos_id]:
        inputs.pop()  # The task ends its inputs; the row goes on.
      assert prompt == inputs, member.name
      loss = targets.tokens[i][targets.weights[i] > 0].tolist()
      expected = example['targets'].tolist()
      # Nothing is read before the first token of a document.
      assert loss == (expected if prompt else expected[1:]), member.name
      if len(expected) < _LENGTHS['targets'] and loss:
        ends += loss[-1] == network.eos_id
        assert loss[-1] == network.eos_id, member.name
    packed = _batch(network, dataset, pack=True)
    segments = packed['decoder_segment_ids']
    places = packed['decoder_positions']
    begins = np.diff(segments, prepend=0, axis=1) > 0
    assert (places[begins] == 0).all()
    params = random_params(network)
    one, other = (_sums(network, params, rows) for rows in (single, packed))
    assert one.tokens == other.tokens > 0
    for name in ('loss', 'cross_entropy', 'correct'):
      np.testing.assert_allclose(
        getattr(one, name), getattr(other, name), rtol=2e-5, err_msg=name
      )
  assert ends


@pytest.mark.parametrize('is_chat', [False, True])
@pytest.mark.parametrize(
  ('family', 'kind'), [('llama3', 'llama3'), ('gemma', 'gemma')]
)
def test_loss_of_gsm8k_at_step_0_is_that_of_hugging_face(
  use, family, kind, is_chat
):
  torch = pytest.importorskip('torch')
  (task,) = use('gsm8k', kind, is_chat)
  lengths = {'inputs': 300, 'targets': 300}
  network = _network(task, family)
  params = random_params(network)
  other = peer(network, params)
  dataset = _examples(task, 3, lengths)
  found = _sums(network, params, _batch(network, dataset, True, lengths))
  total, count = 0.0, 0
  for example in dataset.as_numpy_iterator():
    inputs, targets = (example[name].tolist() for name in lengths)
    assert inputs.pop() == network.eos_id
    prompt = [network.begin_id, *inputs]
    labels = [*[_IGNORED] * len(prompt), *targets]
    with torch.no_grad():
      loss = other(
        input_ids=torch.tensor([[*prompt, *targets]]),
        labels=torch.tensor([labels]),
      ).loss
    total += float(loss) * len(targets)
    count += len(targets)
  assert found.tokens == count
  np.testing.assert_allclose(found.loss, total, rtol=1e-4)


def test_an_end_that_is_padding_too_is_learnt(use):
  """Its gradient is that of a token, and padding has none."""
  (task,) = use('jsonl', 'smollm2', True)
  network = _network(task)
  rows = _batch(network, _examples(task, 4), pack=True)
  targets = network.targets(rows)
  is_end = (targets.tokens == network.eos_id) & (targets.weights > 0)
  assert is_end.sum() == 4
  params = random_params(network)

  def loss(weights):
    logits = network.logits(params, rows)
    return (
      losses.Loss(z_loss=0.0)
      .sums(logits, targets._replace(weights=weights))
      .loss
    )

  each = jax.jit(jax.grad(loss))(targets.weights.astype(np.float32))
  assert (np.asarray(each)[is_end] > 0.1).all()


def test_bits_per_byte_of_all_documents(use, tmp_path):
  (task,) = use('text', 'llama3', False)
  documents = tmp_path / 'documents.jsonl'
  gin.bind_parameter('text.settings.eval_file', str(documents))
  rows = documents.read_text().splitlines()
  texts = [json.loads(row)['text'] for row in rows]
  network = _network(task, 'llama3')
  params = random_params(network)
  evaluate = evaluation.Evaluation(
    'text', _LENGTHS, decoding.GreedyDecoder(), batch_size=4
  )
  partitioner = partitioning.Partitioner()
  with partitioner.activate():
    found = evaluate.prepare(network, partitioner, str(tmp_path))(params, 0)
  assert evaluate.rehearse(network) == list(found)
  rows = task_examples.read(task, _LENGTHS, 'validation')
  rows = list(network.feature_converter(False)(rows, _LENGTHS))
  batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
  nats = _sums(network, params, batch).cross_entropy
  expected = nats / np.log(2) / sum(len(t.encode()) for t in texts)
  np.testing.assert_allclose(found['eval/bits_per_byte'], expected, rtol=1e-5)
  part = dataclasses.replace(evaluate, num_examples=1)
  assert 'eval/bits_per_byte' not in part.rehearse(network)
