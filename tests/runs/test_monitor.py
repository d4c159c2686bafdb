"""The metrics written during training, and those a resumed run keeps."""

import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboard.backend.event_processing import event_accumulator
from tensorboard.backend.event_processing import plugin_event_accumulator
from tensorboard.util import tensor_util
import tiny_t5

from dst_t5x.core import metrics_file
from dst_t5x.core.errors import UserError
from dst_t5x.engine import trainer as trainer_lib
from dst_t5x.method import projection
from dst_t5x.runs import history
from dst_t5x.runs import monitor
from dst_t5x.runs import summaries


def _rows(folder):
  lines = (folder / 'metrics.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines]


def test_a_resumed_run_writes_rows_beyond_its_step_anew(tmp_path):
  first = summaries.Summaries(tmp_path)
  for step in (10, 20, 30):
    first.scalars(step, {'train/loss': step / 10})
  first.close()
  resumed = summaries.Summaries(tmp_path, first_step=20)
  assert _rows(tmp_path) == metrics_file.read(tmp_path)
  assert [row['step'] for row in _rows(tmp_path)] == [10, 20]
  resumed.scalars(30, {'train/loss': 7.0})
  resumed.close()
  assert _rows(tmp_path)[-1] == {'step': 30, 'train/loss': 7.0}
  assert len(list(tmp_path.glob('events.out.tfevents.*'))) >= 1


def test_tensorboard_forgets_the_steps_that_are_repeated(tmp_path):
  # Three lives; each step's value says in which it was written.
  for life, (first, last) in enumerate([(0, 50), (20, 40), (30, 60)]):
    writer = summaries.Summaries(tmp_path, first_step=first)
    for step in range(first + 10, last + 10, 10):
      writer.scalars(step, {'train/loss': float(life)})
      writer.histogram(step, 'far', np.array([[0.0, 1.0, life]]), '')
    writer.close()
  events = plugin_event_accumulator.EventAccumulator(str(tmp_path))
  events.Reload()
  expected = {10: 0, 20: 0, 30: 1, 40: 2, 50: 2, 60: 2}
  for tag, where in (('train/loss', ()), ('far', (0, 2))):
    seen = [
      (event.step, int(tensor_util.make_ndarray(event.tensor_proto)[where]))
      for event in events.Tensors(tag)
    ]
    assert seen == list(expected.items())
  assert [row['train/loss'] for row in _rows(tmp_path)] == [*expected.values()]


def test_what_is_not_a_number_is_left_out(tmp_path):
  writer = summaries.Summaries(tmp_path)
  writer.scalars(1, {'a': float('nan'), 'b': np.float32(2)})
  writer.close()
  assert _rows(tmp_path) == [{'step': 1, 'b': 2.0}]


def test_a_torn_line_is_left_out(tmp_path):
  writer = summaries.Summaries(tmp_path)
  writer.scalars(1, {'a': 1.0})
  writer.close()
  with (tmp_path / 'metrics.jsonl').open('a') as f:
    f.write('{"step": 2, "a"')
  assert metrics_file.read(tmp_path) == [{'step': 1, 'a': 1.0}]
  assert metrics_file.read(tmp_path / 'none') == []


class _Terminal(io.StringIO):
  def isatty(self):
    return True


def test_progress_on_a_terminal_and_elsewhere():
  terminal, file = _Terminal(), io.StringIO()
  for stream in (terminal, file):
    progress = summaries.Progress(2, 4, stream)
    progress.advance()
    progress.pause()
    progress.restart()
    assert progress.report({'loss': 1.5}) > 0
    progress.close()
  assert '3/4' in terminal.getvalue()
  assert 'loss 1.5' in terminal.getvalue()
  assert file.getvalue() == ''  # It goes to the log.


@pytest.fixture(scope='module')
def seed():
  return jax.tree.map(jnp.asarray, tiny_t5.random_params())


def _state(step, params, subset):
  return trainer_lib.TrainState(
    jnp.int32(step),
    params,
    (),
    subset.init(params),
    refused_steps=jnp.int32(0),
    refused_in_row=jnp.int32(0),
  )


def _metrics(loss, refused=0, in_row=0):
  names = ('loss', 'accuracy', 'z_loss', 'learning_rate', 'target_tokens')
  values = dict.fromkeys(names, jnp.float32(2.0)) | {'loss': jnp.float32(loss)}
  return values | {
    'gradient_norm': jnp.float32(jnp.nan),
    'update_norm': jnp.float32(loss * 10),
    'refused_steps': jnp.int32(refused),
    'refused_in_row': jnp.int32(in_row),
  }


def test_the_subset_is_counted_by_module(seed, tmp_path):
  subset = projection.SubsetProjection(epsilon=0.01)
  watch = monitor.Monitor(tmp_path, subset, _state(0, seed, subset), seed, 4)
  changed = jax.tree.map(jnp.asarray, seed)
  kernel = seed['encoder']['layers_1']['mlp']['wo']['kernel']
  changed['encoder']['layers_1']['mlp']['wo']['kernel'] = (
    kernel.at[3, :2].set(0.0).at[0, 0].set(jnp.inf)
  )
  watch.record(1, _metrics(1.0))
  watch.record(2, _metrics(3.0))
  watch.log(2, _state(2, changed, subset), subset, seed)
  watch.record(3, _metrics(4.0))
  # One goes, one comes: of three free ones a third is new.
  kernel = kernel.at[3, :2].set(0.0).at[5, 5].set(0.0)
  changed['encoder']['layers_1']['mlp']['wo']['kernel'] = kernel
  watch.log(3, _state(3, changed, subset), subset, seed)
  watch.close()
  first, second = _rows(tmp_path)
  assert first['train/loss'] == 2.0  # The mean since the last row.
  assert first['train/update_norm'] == 30.0  # Of the last step.
  assert 'train/gradient_norm' not in first
  assert 'train/target_tokens' not in first
  assert first['free/total'] == first['free/encoder/mlp'] == 3
  assert first['free/decoder/mlp'] == 0
  assert first['free/churn'] == 1
  assert second['free/churn'] == pytest.approx(1 / 3)
  assert first['share/encoder/mlp'] == 1
  assert first['share/decoder/mlp'] == 0
  assert {n.removeprefix('free/') for n in first if n.startswith('free/')} - {
    'total',
    'churn',
  } == {
    n.removeprefix('threshold/') for n in first if n.startswith('threshold/')
  }


def test_modules_are_counted_without_silos_too(seed, tmp_path):
  subset = projection.SubsetProjection(epsilon=0.01, silos='none')
  watch = monitor.Monitor(tmp_path, subset, _state(0, seed, subset), seed, 4)
  changed = jax.tree.map(jnp.asarray, seed)
  for layer, columns in (('layers_0', 1), ('layers_1', 2)):
    kernel = seed['encoder'][layer]['mlp']['wo']['kernel']
    changed['encoder'][layer]['mlp']['wo']['kernel'] = kernel.at[
      3, :columns
    ].set(0.0)
  table = seed['token_embedder']['embedding']
  changed['token_embedder']['embedding'] = table.at[0, 0].set(7.0)
  watch.record(1, _metrics(1.0))
  watch.log(1, _state(1, changed, subset), subset, seed)
  watch.close()
  (row,) = _rows(tmp_path)
  assert row['free/total'] == 4
  assert row['free/encoder/mlp'] == 3
  assert row['share/encoder/mlp'] == 0.75
  assert row['share/token_embedder'] == 0.25
  assert 'threshold/model' in row


def test_what_is_saved_is_seen_in_tensorboard(seed, tmp_path):
  subset = projection.SubsetProjection(epsilon=0.01)
  watch = monitor.Monitor(tmp_path, subset, _state(0, seed, subset), seed, 4)
  bins = np.array([[-3.0, -2.75, 5.0], [-2.75, -2.5, 7.0]])
  watch.saved(10, history.Report({'overlap/first': 0.5}, bins))
  watch.saved(20, None)
  watch.saved(20, history.Report({}, np.zeros((0, 3))))
  watch.close()
  assert _rows(tmp_path) == [{'step': 10, 'overlap/first': 0.5}]
  events = event_accumulator.EventAccumulator(str(tmp_path))
  events.Reload()
  (seen,) = events.Tensors('distance/log10')
  assert seen.step == 10
  np.testing.assert_array_equal(
    tensor_util.make_ndarray(seen.tensor_proto), bins
  )
  metadata = events.SummaryMetadata('distance/log10')
  assert metadata.plugin_data.plugin_name == 'histograms'


def test_refused_steps_are_reported_and_then_too_many(seed, tmp_path):
  full = projection.NoProjection()
  watch = monitor.Monitor(tmp_path, full, _state(0, seed, full), (), 9, 2)
  watch.record(1, _metrics(1.0))
  watch.record(2, _metrics(float('nan'), refused=1, in_row=1))
  watch.check()
  assert watch.is_refused
  watch.record(3, _metrics(3.0, refused=1))
  watch.log(3, _state(3, seed, full), full, ())
  assert not watch.is_refused
  (row,) = _rows(tmp_path)
  assert row['train/loss'] == 2.0  # Of the steps that were taken.
  assert row['train/refused_steps'] == 1
  watch.record(4, _metrics(1.0, refused=2, in_row=1))
  watch.record(5, _metrics(float('inf'), refused=3, in_row=2))
  with pytest.raises(UserError, match='the loss is inf at step 5, and 2 in a'):
    watch.record(6, _metrics(1.0))
  watch.close()


def test_a_run_does_not_end_on_a_refused_step(seed, tmp_path):
  full = projection.NoProjection()
  watch = monitor.Monitor(tmp_path, full, _state(0, seed, full), (), 1, 5)
  watch.record(1, _metrics(2.0, refused=1, in_row=1))
  with pytest.raises(UserError, match='an update is not finite at step 1'):
    watch.log(1, _state(1, seed, full), full, ())
  watch.close()
