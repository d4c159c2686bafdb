"""A decoder-only network in T5X: budget, loss, decoding and scores."""

import json

import binaries
import commands
import decoder_only
import jax
import numpy as np
import pytest
from t5x.examples.t5 import network as t5x_network
import toy_task

from dst_t5x.checkpoints import seeds
from dst_t5x.core import parts
from dst_t5x.data import pipeline
from dst_t5x.data import task_checks
from dst_t5x.engine import losses
from dst_t5x.models import decoding
from dst_t5x.models.t5 import network as t5
from dst_t5x.t5x import decoder_only as model_lib
from dst_t5x.t5x import model

_GIN = f'--gin_file={commands.TESTS / "decoder_only.gin"}'
_LENGTHS = {'inputs': 16, 'targets': 16}


@pytest.fixture(scope='module')
def seed(tmp_path_factory):
  """A run of ours, from random parameters; treat it as read-only."""
  folder = tmp_path_factory.mktemp('decoder_only') / 'seed'
  settings = {'MODEL_DIR': folder, 'TRAIN_STEPS': 6, 'LEARNING_RATE': 0.1}
  commands.call(
    'train',
    _GIN,
    '--gin_file=gin/runs/pretrain.gin',
    *commands.flags(BATCH_SIZE=16, EVAL_EXAMPLES=4, **settings),
  )
  return folder


@pytest.fixture(scope='module')
def run(seed, tmp_path_factory):
  """A run of DST in T5X; treat it as read-only."""
  folder = tmp_path_factory.mktemp('t5x') / 'dst'
  _, *flags = binaries.finetune(seed, 'dst', folder)
  binaries.call('train', _GIN, *flags)
  return folder / 'checkpoint_20'


def test_dst_changes_its_budget_and_nothing_else(run, seed):
  before = parts.flatten(seeds.load_seed(seed).params)
  after = parts.flatten(seeds.load_seed(run).params)
  assert before.keys() == after.keys()
  changed = sum(
    int(np.sum(x.view(np.uint32) != before[path].view(np.uint32)))
    for path, x in after.items()
  )
  assert changed == round(0.01 * sum(x.size for x in before.values()))


def _rows(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_both_engines_decode_and_score_alike(run, tmp_path):
  flags = commands.flags(
    CHECKPOINT_PATH=run, EVAL_OUTPUT_DIR=tmp_path / 'scores'
  )
  binaries.call('eval', _GIN, '--gin_file=gin/t5x/eval.gin', *flags)
  file = tmp_path / 'scores/inference_eval/toy-metrics.jsonl'
  theirs = _rows(file)[-1]
  commands.call('eval', _GIN, '--gin_file=gin/runs/eval.gin', *flags)
  ours = json.loads((tmp_path / 'scores/results.json').read_text())
  assert theirs['exact_match'] == ours['toy/exact_match']
  for folder, call, kind in (
    ('theirs', binaries.call, 't5x'),
    ('ours', commands.call, 'runs'),
  ):
    flags = commands.flags(
      CHECKPOINT_PATH=run, INFER_OUTPUT_DIR=tmp_path / folder
    )
    call('infer', _GIN, f'--gin_file=gin/{kind}/infer.gin', *flags)
  theirs = _rows(tmp_path / 'theirs/toy-predict.jsonl-00000-of-00001')
  ours = _rows(tmp_path / 'ours/predictions.jsonl')
  assert {
    row['inputs']['inputs_pretokenized']: row['prediction'] for row in theirs
  } == {row['inputs']: row['prediction'] for row in ours}
  assert any(row['prediction'] for row in ours)


@pytest.mark.parametrize('family', ['gemma2', 'qwen2'])
@pytest.mark.parametrize('scan_layers', [False, True])
def test_the_loss_is_that_of_our_engine(family, scan_layers):
  network = decoder_only.tiny(
    family, vocab_size=264, begin_id=None, scan_layers=scan_layers
  )
  loss = losses.Loss(z_loss=0.0)
  made = model.model(network, toy_task.NAME, _LENGTHS, loss=loss)
  assert isinstance(made, model_lib.DecoderOnlyModel)
  task = task_checks.check(toy_task.NAME, _LENGTHS, 4)
  converter = made.FEATURE_CONVERTER_CLS(pack=True)
  with pipeline.TrainIterator(
    task, _LENGTHS, 4, converter, random_seed=0
  ) as source:
    batch = next(source).batch
  params = made.get_initial_variables(jax.random.key(0), {})['params']
  theirs, _ = made.loss_fn(params, batch, None)
  ours = losses.forward(network, loss, params, batch, None)
  np.testing.assert_allclose(theirs, ours.averages()['loss'], rtol=1e-5)


def test_only_such_a_network_gets_this_model():
  sizes = {'vocab_size': 264, 'emb_dim': 8, 'num_heads': 2, 'head_dim': 4}
  layers = {'num_encoder_layers': 1, 'num_decoder_layers': 1, 'mlp_dim': 8}
  ours = t5.Transformer(t5.T5Config(**sizes, **layers))
  for network in (ours, model.t5x_own(ours)):
    made = model.model(network, toy_task.NAME, _LENGTHS)
    assert isinstance(made, model.EncoderDecoderModel)
  assert isinstance(model.t5x_own(ours), t5x_network.Transformer)


def test_what_the_decoder_decides_is_not_asked_of_t5x():
  network = decoder_only.tiny('qwen2', vocab_size=264)
  made = model.model(
    network, toy_task.NAME, _LENGTHS, decoder=decoding.BeamSearch(2)
  )
  with pytest.raises(ValueError, match='set DECODER'):
    made.predict_batch_with_aux({}, {}, num_decodes=4)
