"""Subsets as SHiRA adapters, against Hugging Face's peft itself."""

import functools
import json

import networks
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy
import shira_bases

from dst_t5x import subsets
from dst_t5x.checkpoints import conversion
from dst_t5x.checkpoints import seeds
from dst_t5x.checkpoints import shira_files
from dst_t5x.checkpoints import subset_command
from dst_t5x.core import parts
from dst_t5x.subsets import extraction

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
peft = pytest.importorskip('peft')

FAMILIES = ['t5', 'llama3', 'gemma3', 'qwen2', 'qwen3']
# Torch warns once of how PEFT makes its sparse tensors. Transformers calls a T5
# tied whose lm_head is a matrix of its own, and PEFT believes it.
pytestmark = [
  pytest.mark.filterwarnings('ignore:Sparse invariant checks'),
  pytest.mark.filterwarnings('ignore:Model .*`tie_word_embeddings=True`'),
  pytest.mark.filterwarnings(
    'ignore:Input and output embeddings are no longer'
  ),
  pytest.mark.filterwarnings('ignore:Setting `save_embedding_layers`'),
]
WEIGHTS = 'adapter_model.safetensors'


@pytest.fixture(scope='module')
def bases(tmp_path_factory):
  """Returns a function: family -> its Base."""
  root = tmp_path_factory.mktemp('bases')
  return functools.cache(functools.partial(shira_bases.make, root))


def _assert_same_bits(found, expected):
  found, expected = (parts.flatten(tree) for tree in (found, expected))
  assert found.keys() == expected.keys()
  for path, array in expected.items():
    assert array.dtype == found[path].dtype == np.float32, path
    assert array.tobytes() == np.ascontiguousarray(found[path]).tobytes(), path


def _run(capsys, *arguments):
  """Runs `subset`; returns its output."""
  assert subset_command.main(list(map(str, arguments))) == 0
  return capsys.readouterr().out


@pytest.mark.parametrize('family', FAMILIES)
def test_peft_computes_the_same_of_ours(family, bases, tmp_path, capsys):
  base = bases(family)
  subset = shira_bases.tuned(base.seed)
  params = subsets.apply(subset, base.seed.params)
  line = conversion.convert(
    shira_bases.save(tmp_path / 'a.dst', subset, base.seed),
    tmp_path / 'shira',
    'peft',
  )
  model = base.theirs()
  without = base.their_logits(model)
  model = peft.PeftModel.from_pretrained(model, tmp_path / 'shira').eval()
  ours = base.our_logits(params)
  np.testing.assert_allclose(ours, base.their_logits(model), atol=5e-5)
  assert np.abs(ours - without).max() > 0.05
  # The way back has the bits that PEFT has.
  merged = base.our_form(model.merge_and_unload())
  loaded = seeds.load_seed(tmp_path / 'shira')
  assert (loaded.format, loaded.step) == ('peft', 12)
  _assert_same_bits(loaded.params, parts.unflatten(merged))
  out = _run(
    capsys, 'extract', tmp_path / 'shira', '--seed', base.path,
    '--output', tmp_path / 'again.dst',
  )  # fmt: skip
  again, about = subsets.load(tmp_path / 'again.dst')
  assert about['step'] == 12
  _assert_same_bits(subsets.apply(again, base.seed.params), loaded.params)
  assert f'{again.size:,} of ' in out
  # And no other bits than ours, but for what was rounded.
  difference = subsets.diff(subset, again)
  assert difference.added.size == 0
  lost = difference.removed.size + difference.changed.size
  assert f' {lost:,} of them come back rounded' in line
  assert 0 < lost < 0.5 * subset.size
  seed, wanted, found = (
    networks.flat(p) for p in (base.seed.params, params, loaded.params)
  )
  for path in subset.positions:
    largest = abs(wanted[path]) + abs(wanted[path] - seed[path])
    assert (abs(found[path] - wanted[path]) <= largest * 2.0**-24).all()


@pytest.mark.parametrize('family', ['t5', 'gemma3'])
def test_export_is_convert_and_any_seed_will_do(
  family, bases, tmp_path, capsys
):
  base = bases(family)
  subset = shira_bases.save(
    tmp_path / 'a.dst', shira_bases.tuned(base.seed), base.seed
  )
  conversion.convert(subset, tmp_path / 'one', 'peft')
  conversion.convert(base.path, tmp_path / 't5x', 't5x')
  for seed, name in ((base.path, 'two'), (tmp_path / 't5x', 'three')):
    out = _run(
      capsys, 'export', subset, '--seed', seed, '--format=peft',
      '--output', tmp_path / name,
    )  # fmt: skip
    assert 'SHiRA, ' in out
    assert ' come back rounded' in out
    tensors = safetensors_numpy.load_file(tmp_path / name / WEIGHTS)
    expected = safetensors_numpy.load_file(tmp_path / 'one' / WEIGHTS)
    assert tensors.keys() == expected.keys()
    for key, array in tensors.items():
      assert array.tobytes() == expected[key].tobytes()
  _run(
    capsys, 'extract', tmp_path / 'one', '--seed', tmp_path / 't5x',
    '--output', tmp_path / 'b.dst',
  )  # fmt: skip
  config = tmp_path / 'one' / 'adapter_config.json'
  stated = json.loads(config.read_text())
  assert stated['base_model_name_or_path'] == base.path
  config.write_text(json.dumps({**stated, 'base_model_name_or_path': 'a/b'}))
  out = _run(
    capsys, 'extract', tmp_path / 'one', '--seed', base.path,
    '--output', tmp_path / 'c.dst',
  )  # fmt: skip
  first, second = (subsets.load(tmp_path / f'{n}.dst')[0] for n in 'bc')
  assert sum(part.size for part in subsets.diff(first, second)) == 0
  weights = [a for n, a in tensors.items() if n.endswith('weight')]
  deltas = sum(map(len, weights))
  assert f'{deltas:,} deltas of SHiRA: {second.size:,} change a value, ' in out


@pytest.mark.parametrize(
  ('family', 'targets', 'rank'),
  [
    ('t5', ['q', 'v'], 2),
    ('t5', r'encoder\..*\.(k|wo)', 1),
    ('t5', ['lm_head', 'wi_0'], 3),
    ('llama3', 'all-linear', 2),
    ('llama3', ['lm_head', 'o_proj'], 1),
    ('gemma3', ['model.layers.1.mlp.down_proj', 'k_proj'], 2),
    ('qwen2', ['q_proj', 'k_proj'], 1),
    ('qwen3', ['gate_proj'], 4),
  ],
)
def test_we_compute_the_same_of_theirs(family, targets, rank, bases, tmp_path):
  base = bases(family)
  model = base.theirs()
  without = base.their_logits(model)
  config = peft.ShiraConfig(
    target_modules=targets, r=rank, random_seed=3,
    task_type='SEQ_2_SEQ_LM' if family == 't5' else 'CAUSAL_LM',
  )  # fmt: skip
  random = torch.Generator().manual_seed(0)
  model = peft.get_peft_model(model, config).eval()
  for name, parameter in model.named_parameters():
    if 'shira' in name:
      parameter.data.normal_(0.0, 0.3, generator=random)
  model.save_pretrained(tmp_path / 'theirs')
  theirs = base.their_logits(model)
  loaded = seeds.load_seed(tmp_path / 'theirs', seed_path=base.path)
  ours = base.our_logits(loaded.params)
  np.testing.assert_allclose(ours, theirs, atol=1e-4)
  assert np.abs(ours - without).max() > 0.05
  merged = base.our_form(model.merge_and_unload())
  _assert_same_bits(loaded.params, parts.unflatten(merged))
  assert 'rounded when added' in loaded.note


def _one(seed, path, old, new):
  """Returns a seed with values of a tensor's begin, and a subset of others."""
  params = {p: x.copy() for p, x in parts.flatten(seed.params).items()}
  params[path].reshape(-1)[: len(old)] = old
  tuned = {**params, path: params[path].copy()}
  tuned[path].reshape(-1)[: len(new)] = new
  params = parts.unflatten(params)
  return params, subsets.extract(parts.unflatten(tuned), params)


def test_what_rounds_is_counted(bases, tmp_path):
  """In float32, 1 + (1e-9 - 1) is 0, and 0.0 + -0.0 is 0.0."""
  seed = bases('t5').seed
  old = np.float32([1, 2, 0.0, 5, -0.0, 1])
  new = np.float32([1e-9, 3, -0.0, -0.0, 0.0, 1 + 2**-23])
  path = 'encoder/layers_0/mlp/wo/kernel'
  params, subset = _one(seed, path, old, new)
  assert subset.size == 6
  reference = {'path': '', 'fingerprint': ''}
  found = shira_files.save(tmp_path / 'a', subset, params, reference, 0)
  assert (found.values, found.maps, found.rank) == (6, 1, 1)
  assert found.padding == 36 - 6
  # Of zeros only the sign is lost: 0.0 for -0.0.
  assert found.lost == 3
  assert found.error == np.float32(1e-9)
  merged, _ = shira_files.load(tmp_path / 'a', params)
  again = subsets.extract(merged, params)
  positions, values = extraction.entries(again, path)
  assert positions.tolist() == [0, 1, 3, 4, 5]
  assert values.tolist() == [0, 3, 0, 0, float(np.float32(1 + 2**-23))]
  assert list(again.positions) == [path]
