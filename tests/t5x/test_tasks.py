"""Our tasks in T5X, over real rows: training, decoding, metrics."""

import binaries
import commands
from fixtures_data import tfds_data_dir  # noqa: F401
from fixtures_super_glue import super_glue_data_dir  # noqa: F401
from fixtures_trivia_qa import trivia_qa_data_dir  # noqa: F401
from fixtures_wmt import sacrebleu_folder  # noqa: F401
import pytest

_METRICS = {
  'gsm8k': 'strict_match',
  'trivia_qa_closed_book': 'em',
  'wmt22_de_en': 'bleu',
  'super_glue': 'accuracy',
}


@pytest.mark.parametrize('task', _METRICS)
def test_a_task_trains_and_is_scored(
  task,
  super_glue_data_dir,  # noqa: F811
  trivia_qa_data_dir,  # noqa: F811
  sacrebleu_folder,  # noqa: F811
  tmp_path,
):
  lengths = '{"inputs": 64, "targets": 16}'
  binaries.call(
    'train',
    '--gin_file=gin/models/t5_1_1_demo.gin',
    f'--gin_file=gin/tasks/{task}.gin',
    '--gin_file=gin/t5x/pretrain.gin',
    f'--gin.TASK_FEATURE_LENGTHS={lengths}',
    *commands.flags(
      MODEL_DIR=tmp_path,
      TRAIN_STEPS=1,
      BATCH_SIZE=4,
      EVAL_PERIOD=1,
      EVAL_STEPS=1,
      EVAL_EXAMPLES=2,
      EVAL_BATCH_SIZE=2,
      CHECKPOINT_PERIOD=1,
      SAVE_DATASET=False,
    ),
  )
  files = list((tmp_path / 'inference_eval').glob('*-metrics.jsonl'))
  assert any(f'"{_METRICS[task]}"' in file.read_text() for file in files)
