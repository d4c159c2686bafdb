"""The artifact of a run with an adapter, and its use in commands."""

import json

import commands
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy
import tiny_t5

from dst_t5x.adapters import lora
from dst_t5x.checkpoints import conversion
from dst_t5x.checkpoints import peft_folder
from dst_t5x.checkpoints import seeds
from dst_t5x.core import errors
from dst_t5x.core import parts

_FILES = ['adapter_config.json', 'adapter_model.safetensors']
# Some in stacked layers, and in a run that ended and then went on.
_STACKED = ['--gin.network.T5Config.scan_layers=True']
_OPTIONS = {
  'lora': _STACKED,
  'dora': _STACKED,
  'pissa': _STACKED,
  'vera': [],
  'prompt': [],
}
_STEPS = {'lora': (3, 5), 'pissa': (3, 5)}


@pytest.fixture(scope='module', params=_OPTIONS)
def run(request, toy_seed, tmp_path_factory):
  """The folder of a run of 5 steps."""
  folder = tmp_path_factory.mktemp('adapters') / request.param
  for steps in _STEPS.get(request.param, (5,)):
    commands.call(
      'train',
      *commands.finetune(toy_seed, request.param),
      *commands.flags(MODEL_DIR=folder, TRAIN_STEPS=steps, EVAL_EXAMPLES=4),
      *_OPTIONS[request.param],
    )
  return folder


def test_the_adapter_that_it_leaves_is_the_run(run, toy_seed, tmp_path):
  adapter = run / 'last_adapter'
  whole, left = seeds.load_seed(run), seeds.load_seed(adapter)
  if run.name == 'pissa':
    assert type(left.adapter) is lora.LoRA
    assert left.adapter.rank == 2 * whole.adapter.rank
  else:
    tiny_t5.assert_same_bits(left.params, whole.params)
  assert left.step == whole.step == 5
  assert sorted(file.name for file in adapter.iterdir()) == _FILES
  assert [path.name for path in run.glob('last_adapter*')] == ['last_adapter']
  stated = json.loads((adapter / _FILES[0]).read_text())
  assert stated['base_model_name_or_path'] == str(toy_seed)


def test_it_evaluates_as_the_run_did(run, tmp_path):
  commands.call(
    'eval',
    commands.TOY,
    '--gin_file=gin/runs/eval.gin',
    *commands.flags(
      CHECKPOINT_PATH=run / 'last_adapter',
      EVAL_OUTPUT_DIR=tmp_path,
      EVAL_EXAMPLES=4,
    ),
    *_OPTIONS[run.name],
  )
  expected = json.loads((run / 'report.json').read_text())['results']
  results = json.loads((tmp_path / 'results.json').read_text())
  assert results['eval/loss'] == pytest.approx(expected['eval/loss'], rel=1e-6)
  assert results['step'] == 5


def test_convert_takes_it_out(run, tmp_path):
  done = commands.finish(
    commands.start('convert', run, tmp_path / 'taken', '--format=peft')
  )
  assert done[0] == 0, done
  assert done[1] == f'{run} (run, step 5) -> {tmp_path / "taken"} (peft)\n'
  taken, left = tmp_path / 'taken', run / 'last_adapter'
  assert (taken / _FILES[0]).read_text() == (left / _FILES[0]).read_text()
  assert peft_folder.about(taken) == peft_folder.about(left)
  tiny_t5.assert_same_bits(
    *(safetensors_numpy.load_file(at / _FILES[1]) for at in (taken, left))
  )


def test_convert_merges_it_if_it_can_be(run, tmp_path):
  adapter = run / 'last_adapter'
  if run.name == 'prompt':
    with pytest.raises(errors.UserError, match='TARGET --format=peft'):
      conversion.convert(adapter, tmp_path / 'hf', 'hf')
    return
  conversion.convert(adapter, tmp_path / 'hf', 'hf')
  merged = seeds.load_seed(tmp_path / 'hf').params
  expected = seeds.load_seed(run).merged().params
  if run.name == 'pissa':
    for path, tensor in parts.flatten(expected).items():
      ours = parts.flatten(merged)[path]
      np.testing.assert_allclose(ours, tensor, atol=1e-5, err_msg=path)
  else:
    tiny_t5.assert_same_bits(merged, expected)


def test_only_runs_with_an_adapter_have_one(run, toy_seed, tmp_path):
  for source in toy_seed, run / 'last_adapter':
    with pytest.raises(errors.UserError, match='is no run that trained an ada'):
      conversion.convert(source, tmp_path / 'x', 'peft')
  assert not (toy_seed / 'last_adapter').exists()
