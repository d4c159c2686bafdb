"""Evaluation counts every example once, for any division of the work."""

import json
import os
import socket
import subprocess
import sys

import commands
import evaluate_echo
import numpy as np
import pytest
import seqio

from dst_t5x.engine import task_scores


@pytest.fixture(scope='module', autouse=True)
def mixture():
  evaluate_echo.add_tasks()
  yield
  seqio.MixtureRegistry.remove(evaluate_echo.NAME)
  for name in evaluate_echo.SIZES:
    seqio.TaskRegistry.remove(name)


@pytest.fixture(scope='module')
def whole(mixture, tmp_path_factory):
  """The evaluation in one batch by one process."""
  return evaluate_echo.evaluate(tmp_path_factory.mktemp('whole'), batch_size=12)


def _assert_equal(results, others):
  assert results.keys() == others.keys()
  for name, value in results.items():
    assert value == pytest.approx(others[name], rel=1e-5), name


def test_every_example_counts_once(whole):
  for name, size in evaluate_echo.SIZES.items():
    assert whole[f'{name}/examples'] == size
    assert whole[f'{name}/different'] == size
    assert whole[f'{name}/exact_match'] == 100


def test_the_average_is_of_tasks_not_of_metrics(whole):
  a, b = (7 + 7 + 100) / 3, (5 + 5 + 100) / 3
  assert whole['echo/average'] == pytest.approx((a + b) / 2)
  scores = {'x': {'f1': 10.0, 'em': 30.0}, 'y': {'accuracy': 60.0}}
  assert task_scores.average(scores) == 40.0


@pytest.mark.parametrize('batch_size', evaluate_echo.BATCH_SIZES)
def test_the_batch_size_changes_nothing(tmp_path, whole, batch_size):
  results = evaluate_echo.evaluate(tmp_path, batch_size=batch_size)
  _assert_equal(results, whole)


def test_some_examples_are_some_of_each_task(tmp_path):
  results = evaluate_echo.evaluate(tmp_path, batch_size=4, num_examples=6)
  assert results['echo_a/examples'] == 6
  assert results['echo_b/examples'] == 5


@pytest.mark.slow
def test_several_processes_change_nothing(repository, tmp_path, whole):
  with socket.socket() as probe:
    probe.bind(('localhost', 0))
    port = probe.getsockname()[1]
  environment = os.environ | {
    'PYTHONPATH': f'{repository}:{repository / "tests"}',
    'XLA_FLAGS': commands.xla_flags('--xla_force_host_platform_device_count=2'),
  }
  processes = [
    subprocess.Popen(
      [sys.executable, evaluate_echo.__file__, str(i), str(port), tmp_path],
      env=environment,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(evaluate_echo.PROCESSES)
  ]
  for process in processes:
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
  for i in range(evaluate_echo.PROCESSES):
    found = json.loads((tmp_path / f'results-{i}.json').read_text())
    assert found['devices'] == 4
    for results in found['results'].values():
      _assert_equal(results, whole)
  for size in evaluate_echo.BATCH_SIZES:
    # Written once, by the first process.
    path = tmp_path / str(size) / 'echo_a-000003.jsonl'
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row['prediction'] for row in rows] == [f'a{i}' for i in range(7)]
    metrics = path.with_name('echo_a-metrics.jsonl').read_text()
    assert len(metrics.splitlines()) == 1
    assert np.isclose(json.loads(metrics)['exact_match'], 100)
