"""The model contract, with a network that differs from T5 in every way."""

import json

import causal_network
import commands
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import subsets as test_subsets

from dst_t5x import subsets
from dst_t5x.adapters import lora
from dst_t5x.checkpoints import seeds
from dst_t5x.core import parts
from dst_t5x.core.errors import UserError
from dst_t5x.engine import budget
from dst_t5x.engine import partitioning
from dst_t5x.models import adapted
from dst_t5x.models import api
from dst_t5x.models import decoding
from dst_t5x.planning import memory
from dst_t5x.serving import model as serving_model
from dst_t5x.subsets import fingerprint

_GIN = f'--gin_file={commands.TESTS / "causal.gin"}'


def _arguments(run, method=None, **bindings):
  files = [f'--gin_file=gin/methods/{method}.gin'] if method else []
  settings = {'BATCH_SIZE': 16, 'LEARNING_RATE': 0.1, 'EVAL_EXAMPLES': 4}
  return [
    *(_GIN, *files, f'--gin_file=gin/runs/{run}.gin'),
    *commands.flags(**settings | bindings),
  ]


@pytest.fixture(scope='module')
def seed(tmp_path_factory):
  folder = tmp_path_factory.mktemp('causal') / 'seed'
  steps = {'TRAIN_STEPS': 20, 'LEARNING_RATE_WARMUP_STEPS': 5}
  commands.call('train', *_arguments('pretrain', MODEL_DIR=folder, **steps))
  return folder


def _tune(seed, folder, method, steps, **bindings):
  commands.call(
    'train',
    *_arguments(
      'finetune',
      method,
      INITIAL_CHECKPOINT_PATH=seed,
      MODEL_DIR=folder,
      TRAIN_STEPS=steps,
      CHECKPOINT_PERIOD=10,
      **bindings,
    ),
  )
  return json.loads((folder / 'report.json').read_text())


def test_it_is_tuned_by_dst_and_resumed_to_the_bit(seed, tmp_path):
  whole = _tune(seed, tmp_path / 'whole', 'dst', 20, EPSILON=0.01)
  for steps in 10, 20:
    report = _tune(seed, tmp_path / 'parts', 'dst', steps, EPSILON=0.01)
  n = sum(x.size for x in jax.tree.leaves(api.shapes(causal_network.Causal())))
  assert whole['free'] == report['free'] == round(0.01 * n)
  files = [tmp_path / name / 'last.dst' for name in ('whole', 'parts')]
  one, other = (subsets.load(file)[0] for file in files)
  assert one.size == whole['free']
  assert subsets.diff(one, other) == subsets.diff(one, one)
  assert {'eval/loss', 'toy/exact_match'} <= whole['results'].keys()


def test_it_is_evaluated_and_decoded(seed, tmp_path):
  where = {'CHECKPOINT_PATH': seed}
  flags = commands.flags(EVAL_OUTPUT_DIR=tmp_path / 'eval', **where)
  commands.call('eval', _GIN, '--gin_file=gin/runs/eval.gin', *flags)
  results = json.loads((tmp_path / 'eval' / 'results.json').read_text())
  assert 0 < results['eval/loss'] < 6
  flags = commands.flags(INFER_OUTPUT_DIR=tmp_path / 'infer', **where)
  commands.call('infer', _GIN, '--gin_file=gin/runs/infer.gin', *flags)
  lines = (tmp_path / 'infer' / 'predictions.jsonl').read_text().splitlines()
  assert len(lines) == 10


def test_decoding_continues_what_teacher_forcing_predicts():
  model, params = causal_network.Causal(), causal_network.random_params(5)
  inputs = np.random.default_rng(0).integers(2, 200, (3, 6)).astype(np.int32)
  prompts = np.stack([model.prompt_of_inputs(row) for row in inputs])
  for decoder in decoding.GreedyDecoder(), decoding.BeamSearch(num_beams=1):
    tokens, _ = decoder(model, params, jnp.asarray(prompts), 5, eos_id=1)
    rows = np.concatenate([prompts, np.asarray(tokens)[:, :-1]], axis=1)
    forced = model.logits(params, {'decoder_input_tokens': rows})
    best = np.asarray(forced.argmax(-1))[:, prompts.shape[1] - 1 :]
    until = np.asarray(tokens) != 0  # Behind an end there is nothing.
    np.testing.assert_array_equal(np.asarray(tokens)[until], best[until])


def test_lora_trains_what_it_adds(seed, tmp_path):
  bindings = {'LORA_TARGETS': 'layers_.*', 'LORA_RANK': 2}
  report = _tune(seed, tmp_path / 'lora', 'lora', 10, **bindings)
  assert report['free'] == 2 * 2 * (24 + 24)
  tuned, base = (seeds.load_seed(path) for path in (tmp_path / 'lora', seed))
  added = parts.flatten(tuned.params)
  for path, tensor in parts.flatten(base.params).items():
    np.testing.assert_array_equal(added.pop(path), tensor)
  assert all(path.rsplit('/', 1)[1] in ('lora_a', 'lora_b') for path in added)
  merged = tuned.merged().params
  tokens = {'decoder_input_tokens': np.arange(8).reshape(1, 8)}
  model = causal_network.Causal()
  np.testing.assert_allclose(
    adapted.with_adapter(model, tuned.adapter).logits(tuned.params, tokens),
    model.logits(merged, tokens),
    atol=1e-5,
  )


def test_an_adapter_is_left_under_its_own_names(seed, tmp_path):
  bindings = {'LORA_TARGETS': 'layers_.*', 'LORA_RANK': 2}
  _tune(seed, tmp_path / 'lora', 'lora', 10, **bindings)
  left = seeds.load_seed(tmp_path / 'lora' / 'last_adapter')
  run = seeds.load_seed(tmp_path / 'lora')
  assert left.format == 'peft'
  found, wanted = parts.flatten(left.params), parts.flatten(run.params)
  assert found.keys() == wanted.keys()
  for path, tensor in wanted.items():
    np.testing.assert_array_equal(found[path], tensor)


@pytest.mark.parametrize(
  'decoder', [decoding.GreedyDecoder(), decoding.BeamSearch(num_beams=3)]
)
def test_it_is_served_with_several_subsets_in_one_batch(decoder):
  network, params = causal_network.Causal(), causal_network.random_params(5)
  host = jax.tree.map(np.asarray, params)
  identity = fingerprint.fingerprint(host)
  served = serving_model.MultiSubsetModel(
    network, lambda: host, identity, max_decode_length=5, mix_up_to=1.0
  )
  inputs = np.random.default_rng(0).integers(2, 200, 7, dtype=np.int32)
  rows, tuned_of_rows = [], []
  for number in (None, 1, 2):
    found, tuned = None, host
    if number is not None:
      draws = np.random.default_rng(number)
      found, tuned = test_subsets.random_subset(host, 0.05, draws)
    row = serving_model.Row(inputs, number, lambda found=found: found)
    rows.append(row)
    tuned_of_rows.append(tuned)
  answers = served.decode(rows, decoder)
  assert served.counts['swaps'] == 0  # They really were mixed.
  for row, tuned, answer in zip(rows, tuned_of_rows, answers, strict=True):
    prompts = network.prompt_of_inputs(row.tokens)[None]
    tuned = jax.tree.map(jnp.asarray, tuned)
    tokens, score = decoder(network, tuned, prompts, 5)
    expected = decoding.continuations(network, np.asarray(tokens))[0]
    np.testing.assert_array_equal(answer.tokens, expected)
    assert answer.score == pytest.approx(float(score[0]), abs=1e-4)
  assert len({tuple(answer.tokens) for answer in answers}) == 3
  test_subsets.assert_same(served.revert(), host)


def test_what_cannot_be_mixed_is_not_served():
  class WithTable(causal_network.Causal):
    """A network with a parameter of its own, which serving cannot correct."""

    def setup(self):
      super().setup()
      self.shift = self.param('shift', jax.nn.initializers.ones, ())

    def sums(self, tokens):
      return super().sums(tokens) + self.shift

  network = WithTable()
  params = network.initialize(jax.random.key(0))['params']
  with pytest.raises(UserError, match='serving cannot give each row a shift'):
    serving_model.MultiSubsetModel(
      network, lambda: params, 'f' * 64, max_decode_length=5
    )


def test_it_is_budgeted_and_estimated():
  model = causal_network.Causal()
  rows = {row.method: row for row in budget.rows(model, targets='layers_.*')}
  assert rows['head_only'].budget.free == 24 * 264
  from dst_t5x.engine import optimizers
  from dst_t5x.engine import trainer as trainer_lib
  from dst_t5x.method import projection

  trainer = trainer_lib.Trainer(
    model,
    optimizers.adafactor(optimizers.schedule(0.1)),
    projection.SubsetProjection(0.01),
  )
  partitioner = partitioning.Partitioner()
  shapes = model.batch_shapes({'inputs': 4, 'targets': 3}, 8, pack=True)
  with partitioner.activate():
    step = memory.abstract_step(trainer, partitioner, shapes)
  counted = memory.count(trainer, step, partitioner.mesh)
  n = rows['full'].budget.free
  assert counted.parameters == counted.seed == 4 * n
  assert counted.activations > 8 * 7 * 264 * 4  # The logits, at least.


def test_an_adapter_needs_no_network_of_ours():
  """Flax's own `Dense` and `DenseGeneral` are linear maps too."""
  from flax import linen as nn

  class Foreign(nn.Module):
    @nn.compact
    def __call__(self, x):
      x = nn.DenseGeneral((3, 4), name='split')(x)
      return nn.DenseGeneral(5, axis=(-2, -1), name='joined')(x)

  adapter = lora.LoRA(rank=2, targets='split|joined')
  x = jnp.arange(12.0).reshape(2, 6) / 10
  with nn.intercept_methods(adapter.intercept):
    params = Foreign().init(jax.random.key(0), x)['params']
    shapes = {
      path: leaf.shape
      for path, leaf in parts.flatten(params).items()
      if 'lora' in path
    }
    assert shapes == {
      'split/lora_a': (6, 2),
      'split/lora_b': (2, 12),
      'joined/lora_a': (12, 2),
      'joined/lora_b': (2, 5),
    }
    before = Foreign().apply({'params': params}, x)
    changed = parts.flatten(params)
    changed['joined/lora_b'] += 1.0
    after = Foreign().apply({'params': parts.unflatten(changed)}, x)
  plain = Foreign().apply({'params': params}, x)
  np.testing.assert_array_equal(before, plain)
  middle = nn.DenseGeneral((3, 4)).apply({'params': params['split']}, x)
  low = middle.reshape(2, 12) @ params['joined']['lora_a']
  wanted = plain + low.sum(-1, keepdims=True) * (adapter.alpha / 2)
  np.testing.assert_allclose(after, wanted, rtol=1e-5)
