"""The best checkpoint by one metric, and the best score of each task."""

import json

from dst_t5x.checkpoints import best
from dst_t5x.runs import summaries


def _row(step, rte, cb, f1, loss=1.0):
  return {
    'step': step,
    'train/loss': 1.0,
    'eval/loss': loss,
    'glue_rte/accuracy': rte,
    'glue_cb/accuracy': cb,
    'glue_cb/f1': f1,
    'glue/average': (rte + (cb + f1) / 2) / 2,
  }


ROWS = [
  {'step': 5, 'train/loss': 2.0},
  _row(10, 50.0, 90.0, 70.0, loss=0.5),
  _row(20, 80.0, 60.0, 60.0),
  _row(30, 70.0, 70.0, 70.0),
  _row(40, 40.0, 80.0, 40.0),
]
STEPS = [10, 20, 30, 40]


def test_the_best_average_counts_and_the_latest_of_equal_ones():
  found = best.find_best(ROWS, 'glue/average', STEPS)
  assert (found['step'], found['by'], found['value']) == (
    *(30, 'glue/average'),
    70.0,
  )
  assert found['scores'] == {
    'glue_rte/accuracy': 70.0,
    'glue_cb/accuracy': 70.0,
    'glue_cb/f1': 70.0,
    'glue/average': 70.0,
  }


def test_the_best_of_each_task_stands_beside_it():
  found = best.find_best(ROWS, 'glue/average', STEPS)
  assert found['best_of_each_task'] == {
    'glue_rte': {'step': 20, 'value': 80.0},
    'glue_cb': {'step': 10, 'value': 80.0},
  }


def test_a_loss_is_best_where_it_is_lowest():
  assert best.find_best(ROWS, 'eval/loss', STEPS)['step'] == 10


def test_before_the_first_evaluation_nothing_is_best(tmp_path):
  assert best.find_best(ROWS[:1], 'glue/average', STEPS) is None
  best.write(tmp_path, 'glue/average', STEPS)
  assert not list(tmp_path.iterdir())


def test_the_file_is_of_the_metrics_that_were_written(tmp_path):
  written = summaries.Summaries(tmp_path)
  for row in ROWS:
    written.scalars(row['step'], {k: v for k, v in row.items() if k != 'step'})
  written.close()
  best.write(tmp_path, 'glue_rte/accuracy', STEPS)
  found = json.loads((tmp_path / 'best.json').read_text())
  assert (found['step'], found['value']) == (20, 80.0)
  best.write(tmp_path, None, STEPS)  # Nothing to go by: what is there stays,
  assert json.loads((tmp_path / 'best.json').read_text()) == found
  best.write(tmp_path, None, [30, 40])  # as long as there is its checkpoint.
  assert not (tmp_path / 'best.json').exists()


def test_a_step_without_a_checkpoint_does_not_count():
  found = best.find_best(ROWS, 'glue/average', [10, 40])
  assert (found['step'], found['value']) == (10, 65.0)
  assert best.find_best(ROWS, 'glue/average', []) is None
  # What a task alone would reach is told of all evaluations.
  assert found['best_of_each_task']['glue_rte'] == {'step': 20, 'value': 80.0}
