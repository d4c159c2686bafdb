"""Decoder-only networks in the commands: training, resumption, inference."""

import json

import commands
import pytest

from dst_t5x import subsets

_GIN = f'--gin_file={commands.TESTS / "decoder_only.gin"}'


def _train(run, folder, *files, **bindings):
  settings = {'MODEL_DIR': folder, 'BATCH_SIZE': 16, 'EVAL_EXAMPLES': 4}
  names = (f'{name}.gin' for name in (*files, f'runs/{run}'))
  commands.call(
    'train',
    _GIN,
    *(f'--gin_file=gin/{name}' for name in names),
    *commands.flags(**settings | bindings),
  )


@pytest.mark.slow
def test_it_is_tuned_resumed_to_the_bit_and_decoded(tmp_path):
  seed = tmp_path / 'seed'
  _train('pretrain', seed, TRAIN_STEPS=10, LEARNING_RATE=0.1)
  for name, ends in (('whole', (8,)), ('parts', (4, 8))):
    for steps in ends:
      _train(
        'finetune',
        tmp_path / name,
        'methods/dst',
        INITIAL_CHECKPOINT_PATH=seed,
        TRAIN_STEPS=steps,
        CHECKPOINT_PERIOD=4,
        EPSILON=0.01,
      )
  whole, resumed = (
    subsets.load(tmp_path / name / 'last.dst')[0] for name in ('whole', 'parts')
  )
  assert subsets.diff(whole, resumed) == subsets.diff(whole, whole)
  report = json.loads((tmp_path / 'whole' / 'report.json').read_text())
  assert report['free'] == whole.size > 0
  assert 0 < report['results']['eval/loss'] < 6
  flags = commands.flags(
    CHECKPOINT_PATH=tmp_path / 'whole', INFER_OUTPUT_DIR=tmp_path / 'infer'
  )
  commands.call('infer', _GIN, '--gin_file=gin/runs/infer.gin', *flags)
  lines = (tmp_path / 'infer' / 'predictions.jsonl').read_text().splitlines()
  assert len(lines) == 10
