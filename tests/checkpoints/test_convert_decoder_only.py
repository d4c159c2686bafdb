"""Runs of decoder-only networks as Hugging Face folders."""

import json

import commands
import numpy as np
import pytest

from dst_t5x.checkpoints import conversion
from dst_t5x.checkpoints import seeds
from dst_t5x.checkpoints import subset_command
from dst_t5x.core import json_object
from dst_t5x.models import families
from dst_t5x.models.decoder_only import network

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')


def _train(run, folder, *files, **bindings):
  settings = {'MODEL_DIR': folder, 'BATCH_SIZE': 4, 'EVAL_EXAMPLES': 4}
  names = (f'{name}.gin' for name in (*files, f'runs/{run}'))
  commands.call(
    'train',
    f'--gin_file={commands.TESTS / "decoder_only.gin"}',
    *(f'--gin_file=gin/{name}' for name in names),
    *commands.flags(**settings | {'TRAIN_STEPS': 2} | bindings),
  )


def _assert_same_logits(folder, run):
  seed = seeds.load_seed(run)
  tokens = np.arange(40).reshape(2, 20) + 3
  ours = seed.network.logits(seed.params, {'decoder_input_tokens': tokens})
  peer = transformers.AutoModelForCausalLM.from_pretrained(
    folder, attn_implementation='eager'
  )
  with torch.no_grad():
    theirs = peer.eval()(torch.from_numpy(tokens)).logits.numpy()
  np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.slow
def test_a_run_becomes_a_hugging_face_folder_with_its_seeds_tokenizer(tmp_path):
  _train('pretrain', tmp_path / 'first')
  conversion.convert(tmp_path / 'first', tmp_path / 'seed', 'hf')
  _assert_same_logits(tmp_path / 'seed', tmp_path / 'first')
  (tmp_path / 'seed' / 'tokenizer.json').write_text('{}')
  of_seed = {'INITIAL_CHECKPOINT_PATH': tmp_path / 'seed'}
  for name, method in (('dst', 'methods/dst'), ('full', 'methods/full')):
    more = {'EPSILON': 0.01} if name == 'dst' else {}
    _train('finetune', tmp_path / name, method, **of_seed, **more)
    conversion.convert(tmp_path / name, tmp_path / f'{name}_hf', 'hf')
    _assert_same_logits(tmp_path / f'{name}_hf', tmp_path / name)
    assert (tmp_path / f'{name}_hf' / 'tokenizer.json').read_text() == '{}'
  subset_command.main(
    [
      'export',
      str(tmp_path / 'dst' / 'last.dst'),
      f'--seed={tmp_path / "seed"}',
      f'--output={tmp_path / "exported"}',
      '--format=hf',
    ]
  )
  exported, converted = (
    seeds.load_seed(tmp_path / name).fingerprint
    for name in ('exported', 'dst_hf')
  )
  assert exported == converted
  assert seeds.load_seed(tmp_path / 'dst' / 'last.dst').network is not None


def test_a_record_states_the_network():
  config = network.DecoderConfig(
    vocab_size=9,
    emb_dim=8,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    mlp_dim=6,
    context_length=5,
    eos_id=1,
    rope=network.Rope(5e5, 2.0, original_length=3),
    local_layers=(True, False),
    sliding_window=2,
    local_rope=network.Rope(7.0),
  )
  fields = {k: v for k, v in vars(config).items() if k != 'dtype'}
  for name in ('rope', 'local_rope'):
    fields[name] = {'id': 'rope', **vars(fields[name])}
  record = {'id': 'decoder_only', 'config': {'id': 'decoder_config', **fields}}
  said = json_object.parse(json.dumps(record), 'run.json')
  assert families.recorded(said).config == config
  record['config']['rope']['theta'] = -1
  for broken in (record, {'id': 'decoder_only', 'config': {'heads': 3}}):
    said = json_object.parse(json.dumps(broken), 'run.json')
    with pytest.raises(Exception, match=r'config in run\.json is damaged'):
      families.recorded(said)
  assert families.recorded(json_object.parse('{"id": "mine"}', 'x')) is None
