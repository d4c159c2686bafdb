"""Hugging Face's folders, read by the reader for PyTorch."""

import json
import os
import pickle
import subprocess

import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy
import subsets as subset_tools
import torch_alone
import torch_models

from dst_t5x import subsets
from dst_t5x.checkpoints import hf_checkpoint
from dst_t5x.checkpoints import seeds
from dst_t5x.core import errors

torch = pytest.importorskip('torch')
pytest.importorskip('transformers')

from dst_t5x.subsets import torch as dst  # noqa: E402
from dst_t5x.subsets.torch import base_hash  # noqa: E402
from dst_t5x.subsets.torch import folders  # noqa: E402


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  folder = tmp_path / 'cache'
  monkeypatch.setenv('DST_CACHE_DIR', str(folder))
  monkeypatch.setattr(folders, '_SETTLED_SECONDS', 0.0)
  return folder / 'fingerprints'


@pytest.fixture
def hashed(monkeypatch):
  """The number of times that a model was hashed."""
  calls = []
  real = base_hash.of_tensors
  monkeypatch.setattr(
    base_hash, 'of_tensors', lambda *a: (calls.append(1), real(*a))[1]
  )
  return calls


@pytest.mark.parametrize('family', torch_models.FAMILIES)
def test_the_fingerprint_of_a_folder(tmp_path, family):
  torch_models.save(tmp_path / 'seed', family)
  wanted = seeds.load_seed(tmp_path / 'seed').fingerprint
  assert dst.fingerprint(tmp_path / 'seed') == wanted
  # As Transformers writes it, in several files.
  model = torch_models.load(tmp_path / 'seed')
  model.save_pretrained(tmp_path / 'again', max_shard_size='5KB')
  assert (tmp_path / 'again' / 'model.safetensors.index.json').exists()
  assert dst.fingerprint(tmp_path / 'again') == wanted


def test_blocks_and_transposition_do_not_matter(tmp_path, monkeypatch):
  from dst_t5x.subsets.torch import tensors

  torch_models.save(tmp_path / 'seed', 'gemma2')
  wanted = seeds.load_seed(tmp_path / 'seed').fingerprint
  for size in (1, 40, 1000):
    monkeypatch.setattr(tensors, '_BLOCK_BYTES', size)
    monkeypatch.setenv('DST_CACHE_DIR', str(tmp_path / f'cache{size}'))
    assert dst.fingerprint(tmp_path / 'seed') == wanted


def test_the_fingerprint_is_cached_until_a_file_changes(
  tmp_path, cache, hashed, monkeypatch
):
  folder = tmp_path / 'seed'
  torch_models.save(folder, 'llama3')
  wanted = dst.fingerprint(folder)
  assert dst.fingerprint(str(folder)) == wanted
  assert len(hashed) == 1
  (file,) = cache.iterdir()
  weights = folder / 'model.safetensors'
  tensors = safetensors_numpy.load_file(weights)
  tensors['lm_head.weight'][3, 4] += 1
  old = weights.stat()
  safetensors_numpy.save_file(tensors, weights, {'format': 'pt'})
  os.utime(weights, ns=(old.st_atime_ns, old.st_mtime_ns))  # As if it were.
  assert dst.fingerprint(folder) != wanted
  assert len(hashed) == 2
  for damage in ('', '{}', '[]', '{"states": null}', 'x'):
    file.write_text(damage)
    assert dst.fingerprint(folder) != wanted
  monkeypatch.setenv('DST_CACHE_DIR', '/proc/nowhere')
  assert dst.fingerprint(folder) != wanted


def test_a_folder_that_may_still_change_is_not_cached(
  tmp_path, cache, monkeypatch
):
  """A file that changes twice within a tick of the clock looks the same."""
  monkeypatch.setattr(folders, '_SETTLED_SECONDS', 1e9)
  torch_models.save(tmp_path / 'seed', 'llama3')
  dst.fingerprint(tmp_path / 'seed')
  assert not cache.exists()


def test_another_version_hashes_again(tmp_path, hashed, monkeypatch):
  torch_models.save(tmp_path / 'seed', 'llama3')
  dst.fingerprint(tmp_path / 'seed')
  monkeypatch.setattr(folders, '_VERSION', '9.0')
  dst.fingerprint(tmp_path / 'seed')
  assert len(hashed) == 2


def test_a_module_is_hashed_once(tmp_path, hashed):
  _, params = torch_models.save(tmp_path / 'seed', 'llama3')
  model = torch_models.load(tmp_path / 'seed')
  for seed in range(3):
    with dst.apply(model, torch_models.subset_of(params, seed=seed)[0]):
      pass
  assert len(hashed) == 1


@pytest.mark.parametrize('family', torch_models.FAMILIES)
def test_extracted_subsets(tmp_path, family):
  network, params = torch_models.save(tmp_path / 'seed', family)
  subset, tuned = torch_models.subset_of(params)
  hf_checkpoint.save(tmp_path / 'tuned', tuned, network)
  found = dst.extract(tmp_path / 'tuned', tmp_path / 'seed')
  subset_tools.assert_equal(found, subset)
  assert found.fingerprint == subset.fingerprint
  # To a file of the same bytes as ours, and back.
  dst.save(tmp_path / 'a.dst', found, {'epsilon': 0.1})
  subsets.save(tmp_path / 'b.dst', subset, {'epsilon': 0.1})
  files = [(tmp_path / name).read_bytes() for name in ('a.dst', 'b.dst')]
  assert files[0] == files[1]
  subset_tools.assert_equal(dst.load(tmp_path / 'a.dst'), subset)


def test_a_model_of_a_family_that_is_not_known_here(tmp_path):
  transformers = pytest.importorskip('transformers')
  config = transformers.GPT2Config(
    n_embd=12, n_layer=2, n_head=2, vocab_size=40, n_positions=16
  )
  torch.manual_seed(0)
  model = transformers.GPT2LMHeadModel(config)
  model.save_pretrained(tmp_path / 'seed')
  with torch.no_grad():
    model.transformer.h[1].attn.c_attn.weight[3, 5] += 1
    model.transformer.wte.weight[7] *= 2
  model.save_pretrained(tmp_path / 'tuned')
  subset = dst.extract(tmp_path / 'tuned', tmp_path / 'seed')
  assert subset.size == 13
  seed = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / 'seed')
  before = torch_models.bits_of(seed)
  with dst.apply(seed, subset):
    assert torch_models.bits_of(seed) == torch_models.bits_of(model)
  assert torch_models.bits_of(seed) == before


def test_models_that_are_not_alike(tmp_path):
  torch_models.save(tmp_path / 'seed', 'llama3')
  torch_models.save(tmp_path / 'other', 'qwen2')
  with pytest.raises(errors.UserError, match='the tuned model has'):
    dst.extract(tmp_path / 'other', tmp_path / 'seed')


def _weights(folder):
  return folder / 'model.safetensors'


def _cut(folder):
  _weights(folder).write_bytes(_weights(folder).read_bytes()[:-8])


def _pickled(folder):
  _weights(folder).unlink()
  (folder / 'pytorch_model.bin').write_bytes(pickle.dumps({}))


def _elsewhere(name):
  def change(folder):
    _weights(folder).rename(folder.parent / 'model.safetensors')
    index = {'weight_map': {'lm_head.weight': name}}
    text = json.dumps(index)
    (folder / 'model.safetensors.index.json').write_text(text)

  return change


def _a_second_head(folder):
  tensors = safetensors_numpy.load_file(_weights(folder))
  tensors['lm_head.weight'] = tensors['model.embed_tokens.weight'] + 1
  safetensors_numpy.save_file(tensors, _weights(folder), {'format': 'pt'})


def _quantised(folder):
  tensors = safetensors_numpy.load_file(_weights(folder))
  tensors['model.norm.weight'] = tensors['model.norm.weight'].astype('i1')
  tensors['ids'] = np.arange(3)
  safetensors_numpy.save_file(tensors, _weights(folder), {'format': 'pt'})


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (_quantised, r'model\.norm\.weight of .* is I8, perhaps quantised'),
    (_cut, 'is truncated or damaged'),
    (_pickled, r'has no model\.safetensors, only a pickle'),
    (_elsewhere('../model.safetensors'), 'names .* no safetensors file of'),
    (_elsewhere('/etc/passwd'), 'names .* no safetensors file of'),
    (_elsewhere(7), 'names 7, which is no safetensors file of'),
    (_elsewhere('a.safetensors'), r'a\.safetensors is missing'),
    (lambda folder: (folder / 'config.json').write_text('{'), 'cannot read'),
    (_a_second_head, r'tensor lm_head\.weight differs from model\.embed'),
  ],
)
def test_damaged_folders(tmp_path, change, message):
  folder = tmp_path / 'seed'
  torch_models.save(folder, 'qwen2')
  change(folder)
  with pytest.raises(errors.UserError, match=message) as error:
    dst.fingerprint(folder)
  assert '\n' not in str(error.value)


_SCRIPT = """
import pathlib, sys
import torch
from safetensors import torch as safetensors_torch
from dst_t5x.subsets import torch as dst
from dst_t5x.subsets import vllm

class Block(torch.nn.Module):
  pass

def module_of(tensors):
  root = Block()
  for name, tensor in tensors.items():
    *path, last = name.split('.')
    block = root
    for part in path:
      if part not in block._modules:
        block.add_module(part, Block())
      block = block.get_submodule(part)
    block.register_parameter(last, torch.nn.Parameter(tensor))
  return root

folder = pathlib.Path(sys.argv[1])
seed, tuned = (
  safetensors_torch.load_file(folder / name / 'model.safetensors')
  for name in ('seed', 'tuned')
)
copies = {name: tensor.clone() for name, tensor in seed.items()}
model = module_of(seed)
same = lambda tensors: all(
  torch.equal(t, tensors[n]) for n, t in model.state_dict().items()
)
subset = dst.load(folder / 'a.dst')
with dst.apply(model, subset):
  assert same(tuned)
  assert not same(copies)
assert same(copies)
dst.apply(model, subset, base=folder / 'seed')
found = dst.extract(folder / 'tuned', folder / 'seed')
dst.save(folder / 'b.dst', found, {'epsilon': 0.1})
assert len(list(vllm.patches(subset, folder / 'seed'))) == len(subset.positions)
top = {name.partition('.')[0] for name in sys.modules}
print(sorted(top & {'jax', 'etils', 'ml_dtypes', 'tensorflow', 'numpy'}))
for name in ('jax', 'etils', 'ml_dtypes', 'flax', 'tensorflow', 'transformers'):
  try:
    __import__(name)
  except ImportError:
    continue
  raise AssertionError(name)
"""


@pytest.mark.parametrize('family', ['t5', 'llama3', 'gemma2', 'qwen3'])
def test_nothing_but_numpy_safetensors_and_torch_is_needed(tmp_path, family):
  network, params = torch_models.save(tmp_path / 'seed', family)
  subset, tuned = torch_models.subset_of(params)
  hf_checkpoint.save(tmp_path / 'tuned', tuned, network)
  subsets.save(tmp_path / 'a.dst', subset, {'epsilon': 0.1})
  (tmp_path / 'packages').mkdir()
  packages = torch_alone.environment(tmp_path / 'packages')
  (tmp_path / 'script.py').write_text(_SCRIPT)
  done = subprocess.run(
    torch_alone.command(packages, tmp_path / 'script.py', str(tmp_path)),
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout == "['numpy']\n"
  files = [(tmp_path / name).read_bytes() for name in ('a.dst', 'b.dst')]
  assert files[0] == files[1]


def test_a_folder_of_other_dtypes(tmp_path):
  torch_models.save(tmp_path / 'seed', 'llama3')
  model = torch_models.load(tmp_path / 'seed', dtype=torch.bfloat16)
  model.save_pretrained(tmp_path / 'half')
  params = seeds.load_seed(tmp_path / 'half').params
  subset, _ = torch_models.subset_of(params)
  assert dst.fingerprint(tmp_path / 'half') == subset.fingerprint
  for dtype in (torch.float32, torch.bfloat16):
    model = torch_models.load(tmp_path / 'half', dtype=dtype)
    rounded = dst.apply(model, subset, base=tmp_path / 'half').rounded
    assert (rounded == 0) == (dtype == torch.float32)
