"""DoRA, PiSSA and VeRA against their definitions, torch and PEFT."""

import dataclasses

import jax
import networks
import numpy as np
import pytest

from dst_t5x.adapters import api as adapters
from dst_t5x.adapters import dora
from dst_t5x.adapters import lora
from dst_t5x.adapters import pissa
from dst_t5x.adapters import vera
from dst_t5x.checkpoints import hf_checkpoint
from dst_t5x.checkpoints import peft_files
from dst_t5x.core import parts
from dst_t5x.core import stacking
from dst_t5x.core.errors import UserError
from dst_t5x.engine import optimizers
from dst_t5x.engine import parameters
from dst_t5x.engine import trainer as trainer_lib
from dst_t5x.method import projection
from dst_t5x.models import adapted
from dst_t5x.models import api

ALL = '.*/(query|key|value|out|wi_0|wi_1|wo)'
ADAPTERS = {
  'rslora': lora.LoRA(rank=3, alpha=6.0, rank_stabilized=True),
  'dora': dora.DoRA(rank=3, alpha=6.0, targets=ALL),
  'pissa': pissa.PiSSA(rank=3, alpha=6.0, targets=ALL),
  'vera': vera.VeRA(rank=7, targets=ALL),
}
BATCH = networks.random_batch(3, 7, 5)


def _params(model, seed=0):
  """Returns random parameters and the fixed tensors that go with them."""
  params = networks.with_fixed(model, networks.random_params(model, seed))
  # Larger ones saturate softmaxes, where rounding shows.
  added = networks.flat(parts.split(params, [model.adapter.added])[0])
  smaller = {
    path: x if path.endswith('magnitude') else 0.3 * x
    for path, x in added.items()
  }
  return parts.join(params, parts.unflatten(smaller))


@pytest.mark.parametrize('name', ADAPTERS)
@pytest.mark.parametrize('stack', [False, True])
def test_merged_weights_give_the_same_logits(name, stack):
  adapter = ADAPTERS[name]
  model = networks.tiny(adapter=adapter, logits_via_embedding=False)
  params = _params(model)
  logits = networks.logits(model, params, BATCH)
  if stack:
    params = stacking.stack_layers(params)
    model = networks.tiny(adapter=adapter, scan_layers=True)
    scanned = networks.logits(model, params, BATCH)
    np.testing.assert_allclose(scanned, logits, atol=1e-4)
  merged = parts.unflatten(adapter.merge(parts.flatten(params)))
  plain = model.base
  assert networks.flat(merged).keys() == networks.flat(api.shapes(plain)).keys()
  again = networks.logits(plain, merged, BATCH)
  np.testing.assert_allclose(again, logits, atol=1e-4)
  base = parts.select(params, merged)
  assert np.abs(networks.logits(plain, base, BATCH) - logits).max() > 0.05


@pytest.mark.parametrize('name', ADAPTERS)
@pytest.mark.parametrize('stack', [False, True])
def test_at_first_the_network_is_the_seed(name, stack):
  model = networks.tiny(adapter=ADAPTERS[name], scan_layers=stack)
  seed = networks.random_params(networks.tiny())
  whole = networks.with_fixed(model, seed)
  added = parameters.initialize_added(model, whole, 0, list)
  params = parts.join(whole, added)
  if stack:
    params, seed = map(stacking.stack_layers, (params, seed))
  assert networks.flat(params).keys() == networks.flat(api.shapes(model)).keys()
  ours = networks.logits(model, params, BATCH)
  theirs = networks.logits(model.base, seed, BATCH)
  # DoRA divides by a norm, and multiplies by the same.
  atol = 1e-5 if name == 'dora' else 0
  np.testing.assert_allclose(ours, theirs, atol=atol, rtol=0)


def test_the_scale_is_of_the_rank_or_its_root():
  assert lora.LoRA(rank=16, alpha=8.0).scale == 0.5
  assert lora.LoRA(rank=16, alpha=8.0, rank_stabilized=True).scale == 2


@pytest.mark.parametrize('shape', [(9, 5), (5, 9), (6, 6), (2, 5, 9)])
def test_principal_components_are_those_of_the_svd(shape):
  w = np.random.default_rng(0).normal(size=shape).astype(np.float32)
  a, b = pissa.principal(w, 3)
  u, s, v = np.linalg.svd(np.asarray(w, np.float64), full_matrices=False)
  expected = (u[..., :3] * s[..., None, :3]) @ v[..., :3, :]
  np.testing.assert_allclose(a @ b, expected, atol=1e-12)
  # Both have their share of the singular values.
  for x in a, np.swapaxes(b, -1, -2):
    np.testing.assert_allclose((x**2).sum(axis=-2), s[..., :3], atol=1e-12)


def test_principal_components_of_few_are_finite():
  w = np.outer(np.arange(4.0), np.ones(6))
  for matrix in w, np.zeros((4, 6)):
    a, b = pissa.principal(matrix, 3)
    np.testing.assert_allclose(a @ b, matrix, atol=1e-7)


def test_a_rank_beyond_the_singular_values_is_refused():
  model = networks.tiny(adapter=pissa.PiSSA(rank=17))
  with pytest.raises(UserError, match=r'LORA_RANK = 17: .* has only 16 singu'):
    _params(model)


@pytest.mark.parametrize('key', [0, 3, 2**31, 2**32 - 1])
def test_random_matrices_are_torch_s_to_the_bit(key):
  torch = pytest.importorskip('torch')
  generator = torch.Generator(device='cpu').manual_seed(key)
  for shape, ours in zip(
    ((256, 33), (50, 256), (1, 1)),
    vera.kaiming_uniform(key, (256, 33), (50, 256), (1, 1)),
    strict=True,
  ):
    # PEFT's initialization.
    bound = np.sqrt(3.0) * np.sqrt(2.0) / np.sqrt(shape[1])
    theirs = torch.empty(shape).uniform_(-bound, bound, generator=generator)
    np.testing.assert_array_equal(
      ours.view(np.uint32), theirs.numpy().view(np.uint32)
    )


def test_random_matrices_are_those_of_peft():
  peft = pytest.importorskip('peft')
  transformers = pytest.importorskip('transformers')
  config = transformers.T5Config(
    vocab_size=9, d_model=12, d_kv=5, num_heads=2, d_ff=30, num_layers=1
  )
  model = transformers.T5ForConditionalGeneration(config)
  options = {'r': 11, 'target_modules': ['q', 'wo'], 'projection_prng_key': 5}
  theirs = peft.get_peft_model(model, peft.VeraConfig(**options)).base_model
  shapes = {'query': (12, 10), 'wo': (30, 12)}
  fixed = vera.VeRA(rank=11, projection_key=5).fixed_tensors(
    list(shapes), {f'{m}/kernel': np.zeros(s) for m, s in shapes.items()}
  )
  for module, (n, features) in shapes.items():
    a, b = theirs.vera_A['default'], theirs.vera_B['default']
    for ours, expected in (
      (fixed[f'{module}/vera_shared_a'], a.numpy()[:, :n].T),
      (fixed[f'{module}/vera_shared_b'], b.numpy()[:features].T),
    ):
      np.testing.assert_array_equal(ours, expected)


@pytest.mark.filterwarnings('ignore:Specified to not')
@pytest.mark.parametrize('name', ['rslora', 'dora', 'vera'])
def test_gradients_are_those_of_peft(name, tmp_path):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  peft = pytest.importorskip('peft')
  adapter = ADAPTERS[name]
  model = networks.tiny(adapter=adapter)
  params = _params(model)
  trained, frozen = parts.split(params, [adapter.added])
  base = parts.select(params, api.shapes(model.base))
  hf_checkpoint.save(tmp_path / 'base', base, model.base)
  reference = {'path': str(tmp_path / 'base'), 'fingerprint': ''}
  flat = parts.flatten(trained)
  peft_files.save(tmp_path / 'it', adapter, flat, base, reference, 0)
  theirs = peft.PeftModel.from_pretrained(
    transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / 'base'),
    tmp_path / 'it',
    is_trainable=True,
  ).eval()
  weights = np.random.default_rng(1).normal(size=(3, 5, networks.VOCAB))
  weights *= (BATCH['decoder_target_tokens'] > 0)[..., None]
  tokens = torch.from_numpy(BATCH['encoder_input_tokens']).long()
  logits = theirs(
    input_ids=tokens,
    attention_mask=(tokens > 0).long(),
    decoder_input_ids=torch.from_numpy(BATCH['decoder_input_tokens']).long(),
  ).logits
  (logits * torch.from_numpy(weights)).sum().backward()
  # A file of gradients, read as one of parameters.
  for parameter in theirs.parameters():
    if parameter.requires_grad:
      parameter.data = parameter.grad
  theirs.save_pretrained(tmp_path / 'gradients')
  _, expected = peft_files.load(tmp_path / 'gradients', base)

  def loss(trained):
    return (model.logits(parts.join(trained, frozen), BATCH) * weights).sum()

  ours = parts.flatten(jax.jit(jax.grad(loss))(trained))
  assert ours.keys() == expected.keys()
  for path, gradient in ours.items():
    largest = np.abs(expected[path]).max()
    assert largest > 0, path
    np.testing.assert_allclose(
      gradient, expected[path], atol=2e-4 * largest, err_msg=path
    )


def test_gradients_of_pissa_are_those_of_a_lora_on_the_residual():
  adapter = pissa.PiSSA(rank=3, alpha=6.0)
  model = networks.tiny(adapter=adapter)
  params = _params(model)
  trained, frozen = parts.split(params, [adapter.added])
  residual = parts.flatten(frozen)
  for module in adapters.modules_of(residual, adapter.fixed):
    a, b = (residual.pop(f'{module}/pissa_{x}') for x in 'ab')
    residual[f'{module}/kernel'] = residual[f'{module}/kernel'] - 2 * a @ b
  plain = networks.tiny(adapter=lora.LoRA(rank=3, alpha=6.0))

  def gradients(model, frozen):
    def loss(trained):
      logits = model.logits(parts.join(trained, frozen), BATCH)
      return (logits**2)[BATCH['decoder_target_tokens'] > 0].mean()

    return parts.flatten(jax.jit(jax.grad(loss))(trained))

  expected = gradients(plain, parts.unflatten(residual))
  for path, ours in gradients(model, frozen).items():
    largest = np.abs(expected[path]).max()
    np.testing.assert_allclose(ours, expected[path], atol=1e-4 * largest)


@pytest.mark.parametrize('name', ['dora', 'pissa', 'vera'])
def test_dropout_is_of_what_is_added(name):
  adapter = dataclasses.replace(ADAPTERS[name], dropout_rate=0.5)
  model = networks.tiny(adapter=adapter, dropout_rate=0.0)
  params = _params(model)
  apply = jax.jit(model.logits)

  def logits(key):
    return apply(params, BATCH, jax.random.key(key))

  np.testing.assert_array_equal(logits(0), logits(0))
  assert np.abs(logits(0) - logits(1)).max() > 1e-3
  # Without a key there is none.
  still = networks.logits(networks.tiny(adapter=ADAPTERS[name]), params, BATCH)
  np.testing.assert_array_equal(networks.logits(model, params, BATCH), still)


@pytest.mark.parametrize('name', ['dora', 'pissa', 'vera'])
def test_it_goes_with_no_projection_and_no_trained(name):
  model = networks.tiny(adapter=ADAPTERS[name])
  kind = type(ADAPTERS[name]).__name__

  def trainer(method, trained=None):
    optimizer = optimizers.adafactor(optimizers.schedule(0.1))
    return trainer_lib.Trainer(model, optimizer, method, trained=trained)

  with pytest.raises(UserError, match=f'^{kind} adds parameters that no seed'):
    trainer(projection.SubsetProjection(0.1))
  with pytest.raises(UserError, match=f'^{kind} trains what it adds and noth'):
    trainer(projection.NoProjection(), ['.*norm/scale'])


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda: vera.VeRA(rank=0), 'LORA_RANK must be a positive whole number'),
    (lambda: vera.VeRA(d_initial='x'), 'VERA_D_INITIAL must be a finite numb'),
    (lambda: vera.VeRA(dropout_rate=1.0), 'LORA_DROPOUT_RATE must be in'),
    (lambda: vera.VeRA(targets='('), 'LORA_TARGETS is no regular expression'),
    (lambda: vera.VeRA(projection_key=-1), 'VERA_PROJECTION_KEY must be a wh'),
    (lambda: vera.VeRA(projection_key=2**32), 'VERA_PROJECTION_KEY must be'),
    (lambda: dora.DoRA(rank=0), 'LORA_RANK must be a positive whole number'),
    (lambda: pissa.PiSSA(alpha=0.0), 'LORA_ALPHA must be above 0'),
    (lambda: lora.LoRA(rank_stabilized=1), 'LORA_RANK_STABILIZED must be Tr'),
  ],
)
def test_mistakes_are_one_line(make, message):
  with pytest.raises(UserError) as caught:
    make()
  assert message in str(caught.value)
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize('name', ADAPTERS)
def test_json_gives_the_adapter_back(name):
  adapter = ADAPTERS[name]
  assert adapters.Adapter.from_json(adapter.to_json()) == adapter


def test_a_lora_recorded_before_rank_stabilization_is_the_same():
  old = {'kind': 'LoRA', 'rank': 3, 'alpha': 6.0, 'targets': 'x'}
  assert adapters.Adapter.from_json(old) == lora.LoRA(3, 6.0, targets='x')
  assert adapted.with_adapter(networks.tiny(), lora.LoRA()).adapter == (
    lora.LoRA(rank_stabilized=False)
  )
