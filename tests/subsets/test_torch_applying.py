"""Subsets in Transformers' modules, applied in place and reverted."""

import concurrent.futures
import contextlib
import copy
import dataclasses
import gc
import weakref

import numpy as np
import pytest
import subsets as subset_tools
import torch_models
from torch_models import FAMILIES

from dst_t5x.core import errors
from dst_t5x.core import parts
from dst_t5x.subsets import fingerprint

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

from dst_t5x.subsets import torch as dst  # noqa: E402
from dst_t5x.subsets.torch import applying  # noqa: E402

TOKENS = np.random.default_rng(0).integers(3, 40, (2, 9), np.int32)


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
  """Returns family -> folder, network, parameters; written once."""
  known = {}

  def folder_of(family):
    if family not in known:
      folder = tmp_path_factory.mktemp(family) / 'seed'
      known[family] = folder, *torch_models.save(folder, family)
    return known[family]

  return folder_of


@pytest.mark.parametrize('family', FAMILIES)
def test_the_same_logits_as_in_jax(folders, family):
  folder, network, params = folders(family)
  subset, tuned = torch_models.subset_of(params)
  model = torch_models.load(folder)
  before = torch_models.bits_of(model)
  base = torch_models.their_logits(family, model, TOKENS)
  with dst.apply(model, subset) as placed:
    theirs = torch_models.their_logits(family, model, TOKENS)
  assert (placed.size, placed.rounded) == (subset.size, 0)
  ours = torch_models.logits(family, network, tuned, TOKENS)
  np.testing.assert_allclose(theirs, ours, atol=1e-4, rtol=1e-4)
  assert np.abs(theirs - base).max() > 0.01
  assert torch_models.bits_of(model) == before
  assert np.array_equal(torch_models.their_logits(family, model, TOKENS), base)


def test_a_thousand_subsets_leave_the_bits_of_the_base(folders):
  folder, _, params = folders('llama3')
  model = torch_models.load(folder)
  before = torch_models.bits_of(model)
  random = np.random.default_rng(0)
  known = fingerprint.fingerprint(params)
  flat = parts.flatten(params)
  types = {p: (t.shape, t.dtype) for p, t in flat.items()}
  empty = torch_models.subset_of(params, 0.0)[0]
  for _ in range(1000):
    positions, values = {}, {}
    for path in random.choice(sorted(types), 5, replace=False):
      size = flat[path].size
      count = random.integers(1, min(size, 50))
      where = np.sort(random.choice(size, count, replace=False))
      positions[path] = where
      # Any bits of a finite float32, denormals and -0.0 too.
      bits = random.integers(0, 2**32, count, np.uint32)
      value = bits.view(np.float32)
      value[~np.isfinite(value)] = -0.0
      values[path] = value
    subset = dst.Subset(empty.tensors, positions, values, known)
    dst.apply(model, subset)
    for path, where in positions.items():
      found = _as_ours(model, path)[where]
      assert found.tobytes() == values[path].tobytes()
    dst.revert(model)
  assert torch_models.bits_of(model) == before


def _as_ours(model, path):
  """Returns a tensor, flattened, by its name's place in the layout."""
  from dst_t5x.models import hf_places

  held = dict(model.named_parameters())
  name, transposed = hf_places.places(held.keys(), {}).tensors[path]
  array = held[name].detach().numpy()
  return np.ascontiguousarray(array.T if transposed else array).reshape(-1)


@pytest.mark.parametrize('family', ['t5', 'qwen2', 'gemma2'])
@pytest.mark.parametrize('name', ['bfloat16', 'float16'])
def test_narrower_models(folders, family, name):
  folder, _, params = folders(family)
  dtype = getattr(torch, name)
  subset, tuned = torch_models.subset_of(params)
  model = torch_models.load(folder, dtype=dtype)
  before = torch_models.bits_of(model)
  # Loading has rounded the seed, so the model alone does not tell.
  with pytest.raises(errors.UserError, match='base=FOLDER'):
    dst.apply(model, subset)
  placed = dst.apply(model, subset, base=folder)
  assert 0 < placed.rounded <= subset.size
  for path, array in parts.flatten(tuned).items():
    rounded = torch.from_numpy(array.copy()).to(dtype).float().numpy()
    if path in subset.positions and 'wo/' not in path:  # T5 keeps it float32.
      where = subset.positions[path]
      found = _as_ours_in_float32(model, path)[where]
      np.testing.assert_array_equal(found, rounded.reshape(-1)[where])
  dst.revert(model)
  assert torch_models.bits_of(model) == before
  dst.apply(model, subset)  # It is known by now.


def _as_ours_in_float32(model, path):
  return _as_ours(copy.deepcopy(model).float(), path)


def test_a_seed_of_bfloat16_needs_no_folder(tmp_path, folders):
  folder, _, params = folders('smollm2')
  torch_models.load(folder, dtype=torch.bfloat16).save_pretrained(tmp_path)
  model = torch_models.load(tmp_path, dtype=torch.bfloat16)
  # As this package reads it: float32 with bfloat16's values.
  exact = {
    path: torch.from_numpy(a).to(torch.bfloat16).float().numpy()
    for path, a in parts.flatten(params).items()
  }
  subset, _ = torch_models.subset_of(parts.unflatten(exact))
  before = torch_models.bits_of(model)
  dst.apply(model, subset)
  assert torch_models.bits_of(model) != before
  dst.revert(model)
  assert torch_models.bits_of(model) == before


def test_a_subset_of_a_tree_of_bfloat16(folders):
  import jax
  import ml_dtypes

  folder, _, params = folders('smollm2')
  half = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), params)
  subset, _ = torch_models.subset_of(half)
  with pytest.raises(errors.UserError, match='does not hold its values'):
    dst.apply(torch_models.load(folder), subset)
  model = torch_models.load(folder, dtype=torch.bfloat16)
  assert dst.apply(model, subset).rounded == 0
  path = next(iter(subset.positions))
  found = _as_ours_in_float32(model, path)[subset.positions[path]]
  wanted = subset.values[path].astype(np.float32)
  np.testing.assert_array_equal(found, wanted)


def test_another_base_is_refused(folders):
  folder, _, params = folders('qwen3')
  subset, _ = torch_models.subset_of(params)
  model = torch_models.load(folder)
  tensor = model.get_parameter('model.layers.1.mlp.up_proj.weight')
  with torch.no_grad():
    # The last bit of one component.
    tensor.view(torch.int32)[3, 4] ^= 1
  changed = torch_models.bits_of(model)
  for base in (None, folder):
    with pytest.raises(errors.UserError, match=r'fingerprint|not the base'):
      dst.apply(model, subset, base)
    assert torch_models.bits_of(model) == changed
  with torch.no_grad():
    tensor.view(torch.int32)[3, 4] ^= 1
  dst.apply(model, subset)
  dst.revert(model)
  with torch.no_grad():  # What was known of the model holds no more.
    tensor.view(torch.int32)[3, 4] ^= 1
  with pytest.raises(errors.UserError, match='fingerprint'):
    dst.apply(model, subset)
  # Of another network.
  other, _ = torch_models.subset_of(torch_models.network_of('llama3')[1])
  with pytest.raises(errors.UserError, match='the model has none'):
    dst.apply(model, other)
  other, _ = torch_models.subset_of(torch_models.network_of('qwen2')[1])
  with pytest.raises(errors.UserError, match='self_attention'):
    dst.apply(model, other)


def test_one_subset_at_a_time_and_as_it_was_applied(folders):
  folder, _, params = folders('llama3')
  model = torch_models.load(folder)
  first, second = (torch_models.subset_of(params, seed=i)[0] for i in (1, 2))
  placed = [dst.place(model, s) for s in (first, second)]
  before = torch_models.bits_of(model)
  with pytest.raises(errors.UserError, match='no subset is applied'):
    dst.revert(model)
  dst.apply(model, placed[0])
  with_first = torch_models.bits_of(model)
  for other in (placed[1], second):
    with pytest.raises(errors.UserError, match='a subset is applied'):
      dst.apply(model, other)
  dst.revert(model)
  for i in (1, 0, 1, 0):
    with dst.apply(model, placed[i]):
      assert (torch_models.bits_of(model) == with_first) == (i == 0)
    assert torch_models.bits_of(model) == before
  with pytest.raises(errors.UserError, match='for another model'):
    dst.apply(torch_models.load(folder), placed[0])
  with pytest.raises(ZeroDivisionError), dst.apply(model, first):
    raise ZeroDivisionError
  assert torch_models.bits_of(model) == before


def test_an_interrupted_write_is_taken_back(folders, monkeypatch):
  folder, _, params = folders('llama3')
  model = torch_models.load(folder)
  placed = dst.place(model, torch_models.subset_of(params)[0])
  write, calls = applying._Entries.write, []

  def interrupted(self, values):
    calls.append(1)
    if len(calls) == 4:
      raise KeyboardInterrupt
    write(self, values)

  states = [torch_models.bits_of(model)]
  for change in (lambda: dst.apply(model, placed), lambda: dst.revert(model)):
    calls.clear()
    with monkeypatch.context() as patched:
      patched.setattr(applying._Entries, 'write', interrupted)
      with pytest.raises(KeyboardInterrupt):
        change()
    assert torch_models.bits_of(model) == states[-1]
    change()
    states.append(torch_models.bits_of(model))
  assert states[0] == states[2] != states[1]


def test_changes_meanwhile_are_noticed(folders):
  folder, _, params = folders('llama3')
  model = torch_models.load(folder)
  subset, _ = torch_models.subset_of(params)
  placed = dst.place(model, subset)
  dst.apply(model, subset)
  with torch.no_grad():
    model.model.norm.weight += 1
  with pytest.raises(errors.UserError, match=r'norm\.weight has been changed'):
    dst.revert(model)
  with torch.no_grad():
    model.model.norm.weight -= 1
  with pytest.raises(errors.UserError, match='has been changed'):
    dst.revert(model.half())
  other = torch_models.load(folder)
  placed = dst.place(other, subset)
  with torch.no_grad():
    other.model.norm.weight += 1
  with pytest.raises(errors.UserError, match='has been changed'):
    dst.apply(other, placed)


def test_memory_that_is_taken_again_is_noticed(folders):
  """Another tensor at the same address, with as many changes."""
  folder, _, params = folders('llama3')
  model = torch_models.load(folder)
  subset, _ = torch_models.subset_of(params)
  weight = model.lm_head.weight
  memory = weight.detach().numpy().copy()
  weight.data = torch.from_numpy(memory)
  with dst.apply(model, subset):
    pass
  state = weight.data_ptr(), weight._version, weight.dtype
  weight.data = torch.zeros(1)
  memory += 1
  weight.data = torch.from_numpy(memory)
  assert (weight.data_ptr(), weight._version, weight.dtype) == state
  with pytest.raises(errors.UserError, match='fingerprint'):
    dst.apply(model, subset)


def test_tensors_that_are_replaced_are_noticed(folders):
  """Else the subset would be written into what the model no longer has."""
  folder, _, params = folders('llama3')
  model = torch_models.load(folder)
  subset, _ = torch_models.subset_of(params)
  placed = dst.place(model, subset)
  old = model.lm_head.weight

  def copied():
    return torch.nn.Parameter(model.lm_head.weight.detach().clone())

  model.lm_head.weight = copied()
  before = torch_models.bits_of(model)
  with pytest.raises(errors.UserError, match='weight has been replaced'):
    dst.apply(model, placed)
  assert torch_models.bits_of(model) == before
  model.lm_head.weight = old
  dst.apply(model, placed)
  tuned = model.lm_head.weight
  model.lm_head.weight = copied()
  with pytest.raises(errors.UserError, match='weight has been replaced'):
    dst.revert(model)
  model.lm_head.weight = tuned
  dst.revert(model)
  assert torch_models.bits_of(model) == before


def test_threads_take_turns(folders):
  folder, _, params = folders('llama3')
  model = torch_models.load(folder)
  subset, _ = torch_models.subset_of(params)
  before = torch_models.bits_of(model)
  placed = dst.place(model, subset)
  done = []

  def work(_):
    with contextlib.suppress(errors.UserError), dst.apply(model, placed):
      done.append(1)

  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    list(pool.map(work, range(200)))
  assert done
  assert torch_models.bits_of(model) == before


def _changed(subset, part, path, change):
  """Returns a subset with another array, or type, of one tensor."""
  content = dict(getattr(subset, part))
  content[path] = change(content[path])
  return dataclasses.replace(subset, **{part: content})


def _big_endian(subset):
  kind = np.dtype('>f4')
  return dataclasses.replace(
    subset,
    tensors={
      p: dataclasses.replace(t, dtype=kind) for p, t in subset.tensors.items()
    },
    values={p: v.astype(kind) for p, v in subset.values.items()},
  )


_NORM = 'decoder/decoder_norm/scale'


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (lambda s: _changed(s, 'positions', _NORM, lambda p: p + 0.0), 'int64'),
    (lambda s: _changed(s, 'positions', _NORM, np.int32), 'int64'),
    (lambda s: _changed(s, 'positions', _NORM, np.uint64), 'int64'),
    (lambda s: _changed(s, 'positions', _NORM, lambda p: p[:, None]), 'int64'),
    (lambda s: _changed(s, 'positions', _NORM, lambda p: p - 99), 'outside'),
    (lambda s: _changed(s, 'positions', _NORM, lambda p: p + 2**62), 'outside'),
    (lambda s: _changed(s, 'positions', _NORM, lambda p: p[::-1]), 'ascending'),
    (lambda s: _changed(s, 'positions', _NORM, lambda p: p * 0), 'ascending'),
    (lambda s: _changed(s, 'values', _NORM, lambda v: v[1:]), 'one value'),
    (lambda s: _changed(s, 'values', _NORM, np.float64), 'are float64'),
    (lambda s: _changed(s, 'values', _NORM, lambda v: v / 0), 'not finite'),
    (
      lambda s: _changed(s, 'values', _NORM, lambda v: v.astype('>f4')),
      'are >f4, the tensor is float32',
    ),
    (_big_endian, 'is >f4; PyTorch needs'),
  ],
)
def test_subsets_that_make_no_sense(folders, change, message):
  folder, _, params = folders('llama3')
  model = torch_models.load(folder)
  before = torch_models.bits_of(model)
  subset, _ = torch_models.subset_of(params, 0.2)
  with (
    np.errstate(all='ignore'),
    pytest.raises(errors.UserError, match=message) as error,
  ):
    dst.apply(model, change(subset))
  assert '\n' not in str(error.value)
  assert torch_models.bits_of(model) == before


class _Odd(torch.Tensor):
  """Such as quantised tensors are: of a class that claims another dtype."""


class _HeadWithState(torch.nn.Linear):
  """A module that saves more than tensors."""

  def get_extra_state(self):
    return {'calls': 7}

  def set_extra_state(self, state):
    del state


def test_odd_tensors_and_states(folders):
  folder, _, params = folders('llama3')
  subset, _ = torch_models.subset_of(params)
  model = torch_models.load(folder)
  plain = model.lm_head
  head = _HeadWithState(plain.in_features, plain.out_features, bias=False)
  head.weight = plain.weight
  model.lm_head = head
  with dst.apply(model, subset) as placed:
    assert placed.size == subset.size
  head.weight = torch.nn.Parameter(plain.weight.detach().as_subclass(_Odd))
  with pytest.raises(errors.UserError, match='is a _Odd, perhaps quantised'):
    dst.apply(model, subset)
  with torch.inference_mode():
    frozen = copy.deepcopy(torch_models.load(folder))
    dst.place(frozen, subset)
  with pytest.raises(errors.UserError, match='was made in inference mode'):
    dst.apply(frozen, subset)


def test_tied_tensors(folders):
  folder, _, params = folders('qwen2')
  subset, tuned = torch_models.subset_of(params)
  model = torch_models.load(folder)
  assert model.lm_head.weight is model.model.embed_tokens.weight
  dst.apply(model, subset)
  table = parts.flatten(tuned)['token_embedder/embedding']
  np.testing.assert_array_equal(model.lm_head.weight.detach(), table)
  dst.revert(model)
  head = torch.nn.Parameter(model.lm_head.weight.detach().clone())
  model.lm_head.weight = head
  with pytest.raises(errors.UserError, match='no'):
    dst.apply(model, subset)


def test_a_head_that_is_one_tensor_here_and_two_in_the_seed(tmp_path):
  network, params = torch_models.network_of('llama3')
  table = params['token_embedder']['embedding']
  params['decoder']['logits_dense']['kernel'] = table.T.copy()
  from dst_t5x.checkpoints import hf_checkpoint

  hf_checkpoint.save(tmp_path / 'seed', params, network)
  model = torch_models.load(tmp_path / 'seed')
  subset, _ = torch_models.subset_of(params)
  dst.apply(model, subset)
  dst.revert(model)
  model.lm_head.weight = model.model.embed_tokens.weight
  with pytest.raises(errors.UserError, match='the model has none'):
    dst.apply(model, subset)
  # T5's seed has both, even where Transformers ties them.
  network, params = torch_models.network_of('t5')
  table = params['token_embedder']['embedding']
  params['decoder']['logits_dense']['kernel'] = table.T.copy()
  hf_checkpoint.save(tmp_path / 't5', params, network)
  model = torch_models.load(tmp_path / 't5')
  model.lm_head.weight = model.shared.weight
  subset, _ = torch_models.subset_of(params)
  with pytest.raises(errors.UserError, match='tie_word_embeddings=False'):
    dst.apply(model, subset)
  del subset.positions['token_embedder/embedding']
  del subset.positions['decoder/logits_dense/kernel']
  dst.apply(model, subset)


def test_what_cannot_hold_a_subset(folders):
  folder, _, params = folders('llama3')
  subset, _ = torch_models.subset_of(params)
  model = torch_models.load(folder).to('meta')
  with pytest.raises(errors.UserError, match='offloaded'):
    dst.apply(model, subset)
  model = torch_models.load(folder)
  model.lm_head.weight = torch.nn.Parameter(
    model.lm_head.weight.to(torch.float8_e4m3fn), requires_grad=False
  )
  with pytest.raises(errors.UserError, match=r'float8_e4m3fn, perhaps'):
    dst.apply(model, subset)
  path = 'decoder/decoder_norm/scale'
  subset.values[path][:] = 1e5
  model = torch_models.load(folder, dtype=torch.float16)
  before = torch_models.bits_of(model)
  with pytest.raises(errors.UserError, match=r'too large for torch\.float16'):
    dst.apply(model, subset, folder)
  assert torch_models.bits_of(model) == before
  subset.values[path][0] = np.nan
  with pytest.raises(errors.UserError, match='is not finite'):
    dst.apply(torch_models.load(folder), subset)


def test_other_forms_of_a_module(folders):
  folder, _, params = folders('llama3')
  subset, _ = torch_models.subset_of(params)
  model = torch_models.load(folder)
  # As some loaders leave it: not contiguous.
  weight = model.lm_head.weight
  weight.data = weight.data.T.contiguous().T
  assert not weight.is_contiguous()
  before = torch_models.bits_of(model)
  straight = torch_models.load(folder)
  dst.apply(model, subset)
  dst.apply(straight, subset)
  assert torch_models.bits_of(model) == torch_models.bits_of(straight)
  dst.revert(model)
  assert torch_models.bits_of(model) == before
  compiled = torch.compile(model)
  dst.apply(compiled, subset)
  dst.revert(model)
  assert torch_models.bits_of(model) == before
  with torch.inference_mode():
    frozen = copy.deepcopy(model)
    with dst.apply(frozen, subset):
      assert torch_models.bits_of(frozen) == torch_models.bits_of(straight)
    assert torch_models.bits_of(frozen) == before


def test_a_module_is_not_kept_alive(folders):
  folder, _, params = folders('llama3')
  model = torch_models.load(folder)
  dst.apply(model, torch_models.subset_of(params)[0])
  there = weakref.ref(model)
  del model
  gc.collect()
  assert there() is None


def test_a_model_on_several_devices(folders):
  """As `device_map` spreads it; without accelerators, over views of the CPU."""
  folder, _, params = folders('llama3')
  subset, _ = torch_models.subset_of(params)
  devices = {'': 'cpu'}
  if torch.cuda.is_available():
    devices = {'model.embed_tokens': 'cpu', 'model.layers': 0,
               'model.norm': 'cpu', 'lm_head': 0,
               'model.rotary_emb': 0}  # fmt: skip
  pytest.importorskip('accelerate')
  model = torch_models.load(folder, device_map=devices)
  before = torch_models.bits_of(model)
  alone = torch_models.load(folder)
  dst.apply(alone, subset)
  with dst.apply(model, subset):
    assert torch_models.bits_of(model) == torch_models.bits_of(alone)
  assert torch_models.bits_of(model) == before


def test_merged_models(tmp_path, folders):
  from dst_t5x.checkpoints import seeds

  folder, _, params = folders('gemma3')
  subset, tuned = torch_models.subset_of(params)
  model = dst.merge(torch_models.load(folder), subset)
  model.save_pretrained(tmp_path / 'tuned')
  found = seeds.load_seed(tmp_path / 'tuned').params
  subset_tools.assert_same(found, tuned)
  with pytest.raises(errors.UserError, match='no subset is applied'):
    dst.revert(model)
