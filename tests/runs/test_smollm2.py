"""The demonstration of a real model, with a tiny one in its place."""

import json

import decoder_only
import fixtures_tokenizers
from fixtures_tokenizers import tokenizer_folders  # noqa: F401
import pytest

from dst_t5x import subsets
from dst_t5x.checkpoints import hf_checkpoint
from dst_t5x.checkpoints import seeds
from dst_t5x.core.errors import UserError
from dst_t5x.runs import demonstrations
from dst_t5x.runs import smollm2
from dst_t5x.tasks import prose


@pytest.fixture
def folder(tmp_path, monkeypatch, tokenizer_folders):  # noqa: F811
  """A tiny model in the place of SmolLM2, and fewer steps."""
  model = decoder_only.tiny(
    'smollm2', vocab_size=fixtures_tokenizers.VOCABULARY_SIZE, eos_id=2
  )
  seed = tmp_path / 'seed'
  hf_checkpoint.save(seed, decoder_only.random_params(model), model)
  for file in tokenizer_folders('smollm2').iterdir():
    (seed / file.name).write_bytes(file.read_bytes())
  sizes = [
    f'--gin.network.DecoderConfig.{name}={getattr(model.config, name)}'
    for name in (
      *('vocab_size', 'emb_dim', 'num_layers', 'num_heads', 'num_kv_heads'),
      *('head_dim', 'mlp_dim'),
    )
  ]
  call = demonstrations.call
  monkeypatch.setattr(
    demonstrations,
    'call',
    lambda *given: call(*given, *sizes, '--gin.EVAL_EXAMPLES=16'),
  )
  monkeypatch.setattr(smollm2, '_STEPS', 4)
  return smollm2.Folder(seed, tmp_path / 'output')


@pytest.mark.slow
def test_it_leaves_table_picture_and_a_subset_a_language(folder, capsys):
  rows = smollm2.demonstrate(folder)
  printed = capsys.readouterr().out
  names = [tuning.name for tuning in smollm2.TUNINGS]
  assert [row['name'] for row in rows] == [
    'zero-shot',
    *names,
    'dst_1e-4_fr',
    'dst_1e-4_es',
  ]
  output = folder.output
  assert json.loads((output / 'results.json').read_text()) == rows
  assert (output / 'loss_vs_budget.png').read_bytes()[1:4] == b'PNG'
  before, *tuned = rows
  assert before['forgetting'] == 0 == before['free_parameters']
  for row in tuned:
    assert row['name'] in printed
    assert row['loss'] > 0
    assert row['forgetting'] != 0
    assert row['seconds_per_step'] > 0
    if row['method'] != 'lora':
      file = output / row['name'] / 'last.dst'
      assert subsets.load(file)[0].size == row['free_parameters'] > 0
      assert file.stat().st_size == row['bytes']
  # One for each language, all of one seed.
  fingerprint = seeds.load_seed(folder.seed).fingerprint
  found = sorted((output / 'subsets').iterdir())
  assert [x.name for x in found] == ['french.dst', 'german.dst', 'spanish.dst']
  for path in found:
    assert subsets.load(path)[1]['seed']['fingerprint'] == fingerprint

  # A second call finds everything done, and says the same.
  assert smollm2.demonstrate(folder) == rows


def test_prose_is_the_same_each_time_and_no_grammar():
  rows = list(prose.rows())
  assert len(rows) == 24
  assert rows == list(prose.rows())
  for row in rows:
    assert len(row['inputs'].split()) == 15
    assert len(row['targets'].split()) == 45
    assert '::=' not in row['inputs'] + row['targets']


def test_a_seed_that_is_no_folder_of_a_model(tmp_path):
  folder = smollm2.Folder(tmp_path / 'none', tmp_path / 'output')
  with pytest.raises(UserError, match=r'none has no config.json: .*=hf'):
    smollm2.demonstrate(folder)
  assert not folder.output.exists()
