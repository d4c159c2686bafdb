"""Forgetting: the loss on held-out text, of the run and of its seed."""

import json
import re

import commands
import jax
import numpy as np
import pytest
from tensorboard.backend.event_processing import event_accumulator

from dst_t5x.checkpoints import seeds
from dst_t5x.core.errors import UserError, first_line
from dst_t5x.data import pipeline

_DOCUMENTS = (
  'The cat sat on the mat, and the dog lay by the door.',
  'Äpfel and pears.',
  'One more text that is longer than a row of the task by far.',
)
_LENGTHS = {'inputs': 1, 'targets': 15}


@pytest.fixture(scope='module')
def documents(tmp_path_factory):
  """A file of documents."""
  file = tmp_path_factory.mktemp('documents') / 'held_out.jsonl'
  rows = (json.dumps({'text': text}) + '\n' for text in _DOCUMENTS)
  file.write_text(''.join(rows))
  return file


def _settings(documents, **more):
  return {
    'HELD_OUT_TASK': 'held_out_text',
    'HELD_OUT_FILE': documents,
    'HELD_OUT_FEATURE_LENGTHS': _LENGTHS,
    'VOCABULARY': 'bytes',
    'EVAL_EXAMPLES': 4,
    **more,
  }


def _train(seed, folder, method='dst', **bindings):
  arguments = {
    'dst': commands.dst(seed),
    'lora': [*commands.finetune(seed, 'lora'), '--gin.LORA_RANK=2'],
    'prompt': [*commands.finetune(seed, 'prompt'), '--gin.PROMPT_LENGTH=2'],
  }[method]
  commands.call(
    'train', *arguments, *commands.flags(MODEL_DIR=folder, **bindings)
  )
  return _read(folder, 'report.json')['results']


def _read(folder, name):
  return json.loads((folder / name).read_text())


def _evaluations(folder):
  rows = map(json.loads, (folder / 'metrics.jsonl').read_text().splitlines())
  return [row for row in rows if 'eval/loss' in row]


@pytest.fixture(scope='module')
def whole(toy_seed, documents, tmp_path_factory):
  """An uninterrupted run of DST; read-only."""
  folder = tmp_path_factory.mktemp('whole') / 'run'
  _train(toy_seed, folder, TRAIN_STEPS=4, EVAL_PERIOD=2, **_settings(documents))
  return folder


def _by_hand(params):
  """Returns nats and tokens of the documents, in NumPy from the logits."""
  from dst_t5x.models.t5 import network

  rows = []
  for text in _DOCUMENTS:
    ids = [byte + 3 for byte in text.encode()] + [1]
    for start in range(0, len(ids), 15):
      before = ids[start - 1 : start] or [0]
      rows.append((before, ids[start : start + 15]))
  targets = np.zeros((len(rows), 15), np.int32)
  for i, (_, of_row) in enumerate(rows):
    targets[i, : len(of_row)] = of_row
  model = network.Transformer(
    network.T5Config(
      vocab_size=264,
      emb_dim=32,
      num_heads=2,
      num_encoder_layers=2,
      num_decoder_layers=1,
      head_dim=8,
      mlp_dim=48,
      mlp_activations=('gelu', 'linear'),
    )
  )
  batch = {
    'encoder_input_tokens': np.array([before for before, _ in rows], np.int32),
    'decoder_input_tokens': np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
    'decoder_target_tokens': targets,
  }
  logits = np.asarray(jax.jit(model.logits)(params, batch), np.float64)
  shifted = logits - logits.max(-1, keepdims=True)
  log_z = np.log(np.exp(shifted).sum(-1))
  of_target = np.take_along_axis(shifted, targets[..., None], -1)[..., 0]
  real = targets > 0
  return float(((log_z - of_target) * real).sum()), int(real.sum())


def test_the_numbers_are_those_of_the_documents(whole, toy_seed):
  results = _read(whole, 'report.json')['results']
  nats, tokens = _by_hand(seeds.load_seed(whole).params)
  of_seed, _ = _by_hand(seeds.load_seed(toy_seed).params)
  assert tokens == sum(len(text.encode()) + 1 for text in _DOCUMENTS)
  assert results['held_out/loss'] == pytest.approx(nats / tokens, rel=1e-5)
  bits = nats / np.log(2) / (tokens - len(_DOCUMENTS))
  assert results['held_out/bits_per_byte'] == pytest.approx(bits, rel=1e-5)
  rise = (nats - of_seed) / tokens
  assert abs(rise) > 1e-3
  assert results['held_out/forgetting'] == pytest.approx(rise, rel=1e-3)


def test_they_are_in_all_files_and_eval_finds_them_again(
  whole, toy_seed, documents, tmp_path
):
  first, last = _evaluations(whole)
  assert last == _read(whole, 'report.json')['results']
  assert first['held_out/loss'] != last['held_out/loss']
  events = event_accumulator.EventAccumulator(
    str(whole), size_guidance={event_accumulator.TENSORS: 0}
  )
  events.Reload()
  for name in ('loss', 'forgetting', 'bits_per_byte'):
    assert [x.step for x in events.Tensors(f'held_out/{name}')] == [2, 4]
  of_seed = _read(whole, 'held_out.json')['loss_of_seed']
  for path, expected in (
    (toy_seed, of_seed),
    (whole / 'last.dst', last['held_out/loss']),
  ):
    output = tmp_path / path.name
    commands.call(
      'eval',
      commands.TOY,
      '--gin_file=gin/runs/eval.gin',
      *commands.flags(
        CHECKPOINT_PATH=path, EVAL_OUTPUT_DIR=output, **_settings(documents)
      ),
    )
    found = _read(output, 'results.json')
    assert found['held_out/loss'] == pytest.approx(expected, rel=1e-6)
    assert 'held_out/forgetting' not in found


def test_the_seed_is_measured_once(whole, toy_seed, documents, tmp_path):
  folder, settings = tmp_path / 'run', _settings(documents, EVAL_PERIOD=2)
  _train(toy_seed, folder, TRAIN_STEPS=2, **settings)
  record = (folder / 'held_out.json').read_text()
  assert record == (whole / 'held_out.json').read_text()
  # What is recorded is used: another number shows that none is computed.
  of_seed = json.loads(record)['loss_of_seed']
  other = json.dumps({**json.loads(record), 'loss_of_seed': of_seed - 1})
  (folder / 'held_out.json').write_text(other)
  results = _train(toy_seed, folder, TRAIN_STEPS=4, **settings)
  expected = _read(whole, 'report.json')['results']
  assert results['held_out/loss'] == expected['held_out/loss']
  assert results['held_out/forgetting'] == pytest.approx(
    expected['held_out/forgetting'] + 1
  )
  # Of other text, it is another number.
  settings['HELD_OUT_EXAMPLES'] = 2
  results = _train(toy_seed, folder, TRAIN_STEPS=5, **settings)
  record = _read(folder, 'held_out.json')
  assert record['num_examples'] == 2
  assert record['loss_of_seed'] != of_seed
  rise = results['held_out/loss'] - record['loss_of_seed']
  assert results['held_out/forgetting'] == rise
  assert 'held_out/bits_per_byte' not in results


def test_it_is_no_part_of_what_a_run_is(whole, toy_seed, documents, tmp_path):
  folder = tmp_path / 'run'
  settings = {'EVAL_PERIOD': 2, 'VOCABULARY': 'bytes', 'EVAL_EXAMPLES': 4}
  results = _train(toy_seed, folder, TRAIN_STEPS=2, **settings)
  assert not any(name.startswith('held_out') for name in results)
  assert not (folder / 'held_out.json').exists()
  results = _train(
    toy_seed, folder, TRAIN_STEPS=4, **settings | _settings(documents)
  )
  assert results == _read(whole, 'report.json')['results']
  assert (folder / 'last.dst').read_bytes() == (whole / 'last.dst').read_bytes()
  assert _read(folder, 'run.json') == _read(whole, 'run.json')
  assert 'held_out' not in (whole / 'run.json').read_text()


@pytest.mark.parametrize('method', ['lora', 'prompt'])
def test_of_all_methods_the_seed_is_the_same(
  method, whole, toy_seed, documents, tmp_path
):
  results = _train(
    toy_seed,
    tmp_path,
    method,
    TRAIN_STEPS=1,
    LEARNING_RATE=0.0,
    **_settings(documents),
  )
  assert _read(tmp_path, 'held_out.json') == _read(whole, 'held_out.json')
  # LoRA begins as the seed; a prompt changes the loss from the start.
  rise = results['held_out/forgetting']
  if method == 'lora':
    assert rise == pytest.approx(0, abs=1e-5)
  else:
    assert abs(rise) > 1e-3


def test_the_best_can_be_the_one_that_forgets_least(
  toy_seed, documents, tmp_path
):
  _train(
    toy_seed,
    tmp_path,
    TRAIN_STEPS=6,
    EVAL_PERIOD=1,
    KEEP_BEST_BY='held_out/loss',
    **_settings(documents, LEARNING_RATE=2.0),
  )
  losses = {row['step']: row['held_out/loss'] for row in _evaluations(tmp_path)}
  best = _read(tmp_path, 'best.json')
  assert best['step'] == min(losses, key=losses.get)
  assert len(set(losses.values())) > 1
  assert best['step'] in commands.checkpoint(tmp_path).steps
  assert not any(name.startswith('held_out') for name in best['scores'])


@pytest.mark.parametrize(
  ('bindings', 'message'),
  [
    (
      {'HELD_OUT_TASK': 'held_out_txt'},
      r"HELD_OUT_TASK = 'held_out_txt': no seqio task .* 'held_out_text'\?",
    ),
    (
      {'HELD_OUT_FILE': None},
      "HELD_OUT_TASK = 'held_out_text': .* needs files: set --gin.HELD_OUT_FI",
    ),
    ({'HELD_OUT_FILE': 'no.txt'}, 'cannot read HELD_OUT_FILE .*no.txt'),
    ({'HELD_OUT_SPLIT': 'dev'}, "'held_out_text' has no split 'dev'"),
    ({'HELD_OUT_FEATURE_LENGTHS': {'inputs': 1}}, "length for 'targets'"),
    ({'KEEP_BEST_BY': 'held_out/los'}, "did you mean 'held_out/loss'"),
  ],
)
def test_mistakes_are_told_before_any_work(
  bindings, message, toy_seed, documents, tmp_path, monkeypatch
):
  monkeypatch.setattr(
    pipeline, 'TrainIterator', lambda *_, **__: pytest.fail('it trains')
  )
  folder = tmp_path / 'run'
  settings = _settings(documents, TRAIN_STEPS=2) | bindings
  with pytest.raises(UserError) as caught:
    _train(toy_seed, folder, **settings)
  assert re.search(message, first_line(caught.value))
  assert not folder.exists()


def _decoder_only(run, folder, documents, **bindings):
  settings = _settings(documents, BATCH_SIZE=16, MODEL_DIR=folder)
  commands.call(
    'train',
    f'--gin_file={commands.TESTS / "decoder_only.gin"}',
    '--gin_file=gin/methods/dst.gin',
    f'--gin_file=gin/runs/{run}.gin',
    *commands.flags(**settings | bindings),
  )
  return _read(folder, 'report.json')['results']


@pytest.mark.slow
def test_decoder_only_models(documents, tmp_path):
  seed, folder = tmp_path / 'seed', tmp_path / 'run'
  results = _decoder_only('pretrain', seed, documents, TRAIN_STEPS=3)
  assert 'held_out/loss' in results
  assert 'held_out/forgetting' not in results  # There is no seed.
  assert not (seed / 'held_out.json').exists()
  tune = {'INITIAL_CHECKPOINT_PATH': seed, 'EPSILON': 0.05, 'TRAIN_STEPS': 3}
  tuned = _decoder_only('finetune', folder, documents, **tune)
  of_seed = _read(folder, 'held_out.json')['loss_of_seed']
  assert of_seed == pytest.approx(results['held_out/loss'], rel=1e-6)
  assert tuned['held_out/forgetting'] == tuned['held_out/loss'] - of_seed != 0
  tokens = sum(len(text.encode()) + 1 for text in _DOCUMENTS)
  # Nothing comes before the first token of a document.
  nats = tuned['held_out/loss'] * (tokens - len(_DOCUMENTS))
  bits = nats / np.log(2) / (tokens - len(_DOCUMENTS))
  assert tuned['held_out/bits_per_byte'] == pytest.approx(bits, rel=1e-5)
  tune['HELD_OUT_FEATURE_LENGTHS'] = {'inputs': 1, 'targets': 64}
  with pytest.raises(UserError, match=r"'held_out_text': a row of 65 tokens"):
    _decoder_only('finetune', tmp_path / 'other', documents, **tune)
