"""The user-defined method and adapter of the docs, trained by commands."""

import json
import re
import textwrap

import commands
import numpy as np
import pytest
from tensorboard.backend.event_processing import event_accumulator
from tensorboard.util import tensor_util

from dst_t5x import subsets
from dst_t5x.checkpoints import seeds
from dst_t5x.core import parts
from dst_t5x.core.errors import UserError


def _write(repository, folder, heading, name):
  """Writes the files that a section of the docs shows; returns its commands."""
  text = (repository / 'docs' / 'methods.md').read_text()
  section = text.split(f'## {heading}\n')[1].split('\n## ')[0]
  indented = (
    line
    for line in section.splitlines(keepends=True)
    if line.startswith('    ') or not line.strip()
  )
  code = textwrap.dedent(''.join(indented))
  _, module, config, *shown = re.split(
    rf'# {name}\.(?:py|gin)\n|# With both .*\n', code
  )
  (folder / f'{name}.py').write_text(module)
  (folder / f'{name}.gin').write_text(config)
  return shown


@pytest.fixture
def largest(repository, toy_seed, tmp_path, monkeypatch):
  """The arguments of `train` for the docs' method."""
  _write(repository, tmp_path, 'A method of your own', 'largest')
  monkeypatch.syspath_prepend(tmp_path)
  arguments = commands.finetune(toy_seed, 'full')
  arguments[1] = f'--gin_file={tmp_path / "largest.gin"}'
  return arguments


def _train(arguments, folder, steps):
  plan = commands.flags(
    MODEL_DIR=folder, TRAIN_STEPS=steps, EVAL_EXAMPLES=4, LOG_PERIOD=2
  )
  commands.call('train', *arguments, *plan)


def test_a_method_of_your_own(largest, toy_seed, tmp_path, caplog):
  folder = tmp_path / 'run'
  with caplog.at_level('INFO'):
    _train(largest, folder, 8)
  seed = parts.flatten(seeds.load_seed(toy_seed).params)
  most = sum(min(10, tensor.size) for tensor in seed.values())
  # What is trained: of each tensor the ten largest weights, bit for bit.
  after = parts.flatten(seeds.load_seed(folder).params)
  free = 0
  for path, tensor in after.items():
    moved = np.flatnonzero(tensor.ravel() != seed[path].ravel())
    order = np.argsort(-np.abs(seed[path].ravel()), kind='stable')
    assert set(moved) <= set(order[:10].tolist())
    free += len(moved)
  assert most / 2 < free <= most
  # How much that is: in the log, the rows, TensorBoard, the report, the file.
  assert f'budget: {most:,} of 39,328 parameters' in caplog.text
  rows = (folder / 'metrics.jsonl').read_text().splitlines()
  *_, row = [row for row in map(json.loads, rows) if 'free/total' in row]
  assert (row['step'], row['free/total']) == (8, free)
  events = event_accumulator.EventAccumulator(str(folder))
  events.Reload()
  last = events.Tensors('free/total')[-1]
  value = tensor_util.make_ndarray(last.tensor_proto)
  assert (last.step, value.item()) == (8, free)
  report = json.loads((folder / 'report.json').read_text())
  assert (report['free'], report['budget']) == (free, most)
  assert subsets.load(folder / 'last.dst')[0].size == free


def test_a_method_of_your_own_is_resumed_to_the_bit(largest, tmp_path):
  _train(largest, tmp_path / 'run', 8)
  for steps in (3, 8):
    _train(largest, tmp_path / 'in two', steps)
  whole, in_two = (
    (tmp_path / name / 'last.dst').read_bytes() for name in ('run', 'in two')
  )
  assert whole == in_two


def test_another_setting_is_another_run(largest, tmp_path):
  _train(largest, tmp_path / 'run', 2)
  other = [*largest, '--gin.LargestWeights.k=11']
  with pytest.raises(UserError, match=r'method\.k = 10, not 11'):
    _train(other, tmp_path / 'run', 3)


def test_the_budget_of_a_method_of_your_own(repository, tmp_path):
  shown = _write(repository, tmp_path, 'A method of your own', 'largest')
  (command,) = shown
  assert command.split()[1:4] == ['python', '-m', 'dst_t5x.budget']
  printed = commands.run(
    'budget',
    commands.TOY,
    f'--gin_file={tmp_path / "largest.gin"}',
    environment={'PYTHONPATH': str(tmp_path)},
  )
  title, _, row, *_ = printed.splitlines()
  assert title == '39,328 parameters'
  name, setting, free, *_ = row.split()
  assert (name, setting) == ('largest_weights', 'k=10')
  assert 0 < int(free) < 1000


@pytest.mark.slow
def test_an_adapter_of_your_own(repository, toy_seed, tmp_path, monkeypatch):
  _write(repository, tmp_path, 'An adapter of your own', 'biases')
  monkeypatch.syspath_prepend(tmp_path)
  arguments = commands.finetune(toy_seed, 'full')
  arguments[1] = f'--gin_file={tmp_path / "biases.gin"}'
  folder = tmp_path / 'run'
  _train(arguments, folder, 5)
  report = json.loads((folder / 'report.json').read_text())
  # Of 4 attentions with 3 · 16 + 32 outputs, 3 feed-forwards, and the logits.
  assert report['free'] == 4 * (3 * 16 + 32) + 3 * (2 * 48 + 32) + 264
  # In a process of its own, `eval` has to be told where the class is.
  arguments = [
    commands.TOY,
    '--gin_file=gin/runs/eval.gin',
    '--gin.EVAL_EXAMPLES=4',
    *commands.flags(CHECKPOINT_PATH=folder, EVAL_OUTPUT_DIR=tmp_path / 'eval'),
  ]
  status, _, err = commands.finish(commands.start('eval', *arguments))
  assert status == 1
  assert "kind 'Biases' is not known" in err.splitlines()[-1]
  file = f'--gin_file={tmp_path / "biases.gin"}'
  commands.run('eval', *arguments, file, environment={'PYTHONPATH': tmp_path})
