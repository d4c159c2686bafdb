"""Patches for vLLM, written by the very file of vLLM that writes them.

DST_VLLM_WHEEL names vLLM's wheel, of which one file is loaded, without CUDA:
`pip download --no-deps 'vllm==0.33.*'`.
"""

import os
import sys
import types
import zipfile

import numpy as np
import pytest
import torch_models

from dst_t5x import subsets
from dst_t5x.checkpoints import hf_checkpoint
from dst_t5x.core import errors

torch = pytest.importorskip('torch')
pytest.importorskip('transformers')

from safetensors import torch as safetensors_torch  # noqa: E402

from dst_t5x.subsets import vllm  # noqa: E402

_MODULE = 'vllm.model_executor.model_loader.checkpoint_weight_patch'
_PACKED = {'q_proj': 'qkv_proj', 'k_proj': 'qkv_proj', 'v_proj': 'qkv_proj',
           'gate_proj': 'gate_up_proj', 'up_proj': 'gate_up_proj'}  # fmt: skip


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
  monkeypatch.setenv('DST_CACHE_DIR', str(tmp_path / 'cache'))


@pytest.fixture
def theirs(monkeypatch):
  """VLLM's own module."""
  wheel = os.environ.get('DST_VLLM_WHEEL')
  if not wheel:
    pytest.skip('DST_VLLM_WHEEL names no wheel of vLLM')
  path = _MODULE.replace('.', '/') + '.py'
  with zipfile.ZipFile(wheel) as archive:
    code = compile(archive.read(path), path, 'exec')
  parts = _MODULE.split('.')
  for i in range(1, len(parts) + 1):
    name = '.'.join(parts[:i])
    module = types.ModuleType(name)
    monkeypatch.setitem(sys.modules, name, module)
    if i > 1:
      setattr(sys.modules['.'.join(parts[: i - 1])], parts[i - 1], module)
  exec(code, module.__dict__)
  return module


class Rank(torch.nn.Module):
  """Half of a model as vLLM holds it: packed, and sharded by rows."""

  def __init__(self, weights, rank, dtype):
    super().__init__()
    self._rank = rank
    rows = {}
    self._places = {}
    for name, tensor in weights.items():
      packed = self._packed(name)
      start = rows.setdefault(packed, 0)
      count = len(tensor) // 2
      self._places[name] = packed, slice(start, start + count)
      rows[packed] += count
    self.held = {
      packed: torch.zeros(
        (count, *weights[self._first(packed)].shape[1:]), dtype=dtype
      )
      for packed, count in rows.items()
    }
    self.load_weights(weights.items())

  @staticmethod
  def _packed(name):
    for part, packed in _PACKED.items():
      name = name.replace(f'.{part}.', f'.{packed}.')
    return name

  def _first(self, packed):
    return next(n for n, (p, _) in self._places.items() if p == packed)

  def load_weights(self, weights):
    loaded = set()
    for name, tensor in weights:
      packed, where = self._places[name]
      shard = tensor.chunk(2)[self._rank]
      self.held[packed][where].copy_(shard)
      loaded.add(name)
    return loaded

  def bits(self):
    return {
      name: tensor.view(torch.uint8).numpy().tobytes()
      for name, tensor in self.held.items()
    }


@pytest.fixture(scope='module', params=['llama3', 'qwen2', 'gemma3'])
def models(request, tmp_path_factory):
  """Returns subset and folders of seed and tuned model."""
  root = tmp_path_factory.mktemp(request.param)
  network, params = torch_models.save(root / 'seed', request.param)
  subset, tuned = torch_models.subset_of(params)
  hf_checkpoint.save(root / 'tuned', tuned, network)
  subsets.save(root / 'a.dst', subset, {})
  return subset, root / 'seed', root / 'tuned'


def _weights(folder):
  return safetensors_torch.load_file(folder / 'model.safetensors')


def _written(weights, patches):
  """Returns a checkpoint's tensors with patches in them."""
  found = {name: tensor.clone() for name, tensor in weights.items()}
  for patch in patches:
    assert patch.shape == tuple(found[patch.name].shape)
    assert patch.indices.dtype == torch.int64
    assert patch.indices[0] >= 0
    assert (patch.indices.diff() > 0).all()
    assert patch.indices[-1] < found[patch.name].numel()
    assert patch.values.dtype == patch.dtype
    found[patch.name].reshape(-1)[patch.indices] = patch.values
  return found


def _assert_equal(left, right):
  assert left.keys() == right.keys()
  for name, tensor in left.items():
    assert torch.equal(tensor, right[name]), name


def test_patches_lead_to_the_tuned_checkpoint_and_back(models):
  subset, seed, tuned = models
  forward = list(vllm.patches(subset, seed))
  assert sum(len(patch.indices) for patch in forward) == subset.size
  _assert_equal(_written(_weights(seed), forward), _weights(tuned))
  back = list(vllm.patches(subset, seed, reverse=True))
  _assert_equal(_written(_weights(tuned), back), _weights(seed))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_vllm_writes_them(theirs, models, dtype):
  subset, seed, tuned = models
  for rank in (0, 1):
    model = Rank(_weights(seed), rank, dtype)
    before = model.bits()
    wanted = Rank(_weights(tuned), rank, dtype).bits()
    assert wanted != before
    theirs.load_checkpoint_weight_patches(model, vllm.patches(subset, seed))
    assert model.bits() == wanted
    theirs.load_checkpoint_weight_patches(
      model, vllm.patches(subset, seed, reverse=True), max_chunk_bytes=1000
    )
    assert model.bits() == before


def test_a_worker_changes_its_subset(theirs, models, tmp_path):
  subset, seed, tuned = models

  class Worker(vllm.WorkerExtension):
    def get_model(self):
      return model

  model = Rank(_weights(seed), 1, torch.bfloat16)
  before, worker = model.bits(), Worker()
  worker.dst_t5x_revert()
  assert model.bits() == before
  params = hf_checkpoint.load(seed).params
  other, _ = torch_models.subset_of(params, seed=5)
  subsets.save(tmp_path / 'other.dst', other, {})
  with_file = str(seed.parent / 'a.dst'), str(seed)
  assert worker.dst_t5x_apply(*with_file) == subset.size
  wanted = Rank(_weights(tuned), 1, torch.bfloat16).bits()
  assert model.bits() == wanted
  with pytest.raises(errors.UserError, match='fingerprint'):
    worker.dst_t5x_apply(with_file[0], str(tuned))
  assert model.bits() == wanted
  worker.dst_t5x_apply(str(tmp_path / 'other.dst'), str(seed))
  assert model.bits() != wanted
  worker.dst_t5x_apply(*with_file)
  assert model.bits() == wanted
  worker.dst_t5x_revert()
  assert model.bits() == before


def test_a_write_that_fails_is_taken_back(theirs, models, monkeypatch):
  _, seed, _ = models

  class Worker(vllm.WorkerExtension):
    def get_model(self):
      return model

  model = Rank(_weights(seed), 0, torch.float32)
  before, worker, real = model.bits(), Worker(), model.load_weights

  def failing(weights):
    real(weights[:3])
    raise RuntimeError('no more memory')

  with monkeypatch.context() as patched:
    patched.setattr(model, 'load_weights', failing)
    with pytest.raises(RuntimeError, match='no more memory'):
      worker.dst_t5x_apply(str(seed.parent / 'a.dst'), str(seed))
  assert model.bits() != before
  worker.dst_t5x_revert()
  assert model.bits() == before


def test_nan_is_refused(models, tmp_path):
  subset, seed, _ = models
  path = min(subset.positions)
  values = {p: v.copy() for p, v in subset.values.items()}
  values[path][0] = np.nan
  odd = subsets.Subset(
    subset.tensors, subset.positions, values, subset.fingerprint
  )
  with pytest.raises(errors.UserError, match='is not finite'):
    vllm.patches(odd, seed)
  params = hf_checkpoint.load(seed).params
  network = hf_checkpoint.model_of(seed).network
  params['decoder']['decoder_norm']['scale'][:] = np.nan
  hf_checkpoint.save(tmp_path / 'nan', params, network)
  other, _ = torch_models.subset_of(params, share=0.5)
  where, what = dict(other.positions), dict(other.values)
  norm = 'decoder/decoder_norm/scale'
  where[norm], what[norm] = np.array([1]), np.ones(1, np.float32)
  other = subsets.Subset(other.tensors, where, what, other.fingerprint)
  back = vllm.patches(other, tmp_path / 'nan', reverse=True)
  with pytest.raises(errors.UserError, match=r'NaN in model\.norm\.weight'):
    list(back)


def test_a_value_too_large_for_the_server(models, tmp_path):
  subset, seed, _ = models
  values = {p: v.copy() for p, v in subset.values.items()}
  values[max(values)][0] = 1e5
  large = subsets.Subset(
    subset.tensors, subset.positions, values, subset.fingerprint
  )
  subsets.save(tmp_path / 'large.dst', large, {})

  class Worker(vllm.WorkerExtension):
    def get_model(self):
      return torch.nn.Linear(2, 2, dtype=torch.float16)

  with pytest.raises(errors.UserError, match='too large for float16') as error:
    Worker().dst_t5x_apply(str(tmp_path / 'large.dst'), str(seed))
  assert max(values) in str(error.value)


def test_another_base_is_refused(models):
  subset, _, tuned = models
  with pytest.raises(errors.UserError, match='fingerprint'):
    vllm.patches(subset, tuned)
