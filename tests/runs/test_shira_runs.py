"""What a run of a sparse method trained, as a SHiRA adapter of PEFT."""

import json

import commands
import numpy as np
import pytest
import refusals
from safetensors import numpy as safetensors_numpy
import tiny_t5

from dst_t5x import subsets
from dst_t5x.checkpoints import conversion
from dst_t5x.checkpoints import seeds

_OTHERS = ['token_embedder/.*', '.*/scale', '.*/rel_embedding']


@pytest.fixture(scope='module')
def run(toy_seed, tmp_path_factory):
  """The folder of a run of DST on linear maps alone."""
  folder = tmp_path_factory.mktemp('shira') / 'run'
  commands.call(
    'train',
    *commands.dst(toy_seed),
    *commands.flags(MODEL_DIR=folder, TRAIN_STEPS=12, EVAL_EXAMPLES=4),
    f'--gin.EXCLUDE={_OTHERS}',
  )
  return folder


def test_convert_writes_it(run, toy_seed, tmp_path):
  done = commands.finish(
    commands.start('convert', run, tmp_path / 'shira', '--format=peft')
  )
  assert done[0] == 0, done
  subset, _ = subsets.load(run / 'last.dst')
  assert done[1].startswith(
    f'{run} (run, step 12) -> {tmp_path / "shira"} (peft: SHiRA,'
    f' {subset.size:,} values in '
  )
  stated = json.loads((tmp_path / 'shira/adapter_config.json').read_text())
  assert stated['base_model_name_or_path'] == str(toy_seed)
  found = seeds.load_seed(tmp_path / 'shira')
  assert found.step == 12
  expected = tiny_t5.flat(seeds.load_seed(run).params)
  for path, array in tiny_t5.flat(found.params).items():
    np.testing.assert_allclose(array, expected[path], rtol=0, atol=1e-6)
  # The subset file that the run leaves is the same.
  conversion.convert(run / 'last.dst', tmp_path / 'again', 'peft')
  tiny_t5.assert_same_bits(
    *(
      safetensors_numpy.load_file(tmp_path / name / 'adapter_model.safetensors')
      for name in ('shira', 'again')
    )
  )


def test_a_run_of_all_parameters_is_refused(toy_run, toy_seed, tmp_path):
  said = refusals.refusal(conversion.convert, toy_run, tmp_path / 'x', 'peft')
  assert 'SHiRA changes linear maps only' in said
  assert 'token_embedder/embedding' in said
  said = refusals.refusal(conversion.convert, toy_seed, tmp_path / 'x', 'peft')
  assert 'is no run that trained an adapter' in said
  assert not (tmp_path / 'x').exists()
