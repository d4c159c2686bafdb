"""The random-mask baseline, step by step, against SHiRA of Hugging Face's peft.

SHiRA trains the deltas of a fixed mask. We train all parameters and reset what
is outside of the mask. SGD and Adam treat components one by one, so both are
the same method, up to rounding: θ⁰ + δ there, θ here.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors import numpy as safetensors_numpy

from dst_t5x import subsets
from dst_t5x.checkpoints import shira_files
from dst_t5x.method import masks
from dst_t5x.method import projection

torch = pytest.importorskip('torch')
peft = pytest.importorskip('peft')

# Torch warns once of how PEFT makes its sparse tensors.
pytestmark = pytest.mark.filterwarnings('ignore:Sparse invariant checks')
# Both maps have as many parameters, so that SHiRA's r · (in + out) deltas are
# one ε for both.
SHAPES = {'first': (12, 8), 'second': (8, 12)}  # [in, out]
BUDGET = 12 + 8
EPSILON = BUDGET / (12 * 8)
STEPS = 20
OPTIMIZERS = {
  'sgd': (optax.sgd(0.1), functools.partial(torch.optim.SGD, lr=0.1)),
  'adam': (optax.adam(0.02), functools.partial(torch.optim.Adam, lr=0.02)),
}
REFERENCE = {'path': '', 'fingerprint': '0' * 64}


def _seed():
  rng = np.random.default_rng(0)
  return {
    name: {'kernel': rng.normal(0, 0.4, shape).astype(np.float32)}
    for name, shape in SHAPES.items()
  }


def _batches():
  """Returns inputs and targets, [steps, rows, 12] each."""
  rng = np.random.default_rng(1)
  inputs = rng.normal(size=(STEPS, 16, 12)).astype(np.float32)
  return inputs, (inputs @ rng.normal(size=(12, 12))).astype(np.float32)


def _their_network():
  network = torch.nn.Sequential()
  for name, kernel in _seed().items():
    kernel = kernel['kernel']
    linear = torch.nn.Linear(*kernel.shape, bias=False)
    linear.weight.data = torch.from_numpy(kernel.T.copy())
    network.add_module(name, linear)
  return network


def _their_steps(model, optimizer):
  """Trains a PEFT model; yields name -> its weights as [in, out]."""
  trained = [p for p in model.parameters() if p.requires_grad]
  assert sum(p.numel() for p in trained) == 2 * BUDGET
  optimizer = optimizer(trained)
  for inputs, targets in zip(*_batches(), strict=True):
    optimizer.zero_grad()
    loss = torch.nn.functional.mse_loss(
      model(torch.from_numpy(inputs)), torch.from_numpy(targets)
    )
    loss.backward()
    optimizer.step()
    yield {name: _weight(model, name) for name in SHAPES}


def _weight(model, name):
  layer = model.base_model.model.get_submodule(name)
  delta = layer.get_delta_weight('default').to_dense()
  return (layer.base_layer.weight + delta).detach().numpy().T


def _our_steps(method, state, optimizer):
  """Trains our network; yields its parameters."""
  seed = _seed()

  def loss(params, inputs, targets):
    hidden = inputs @ params['first']['kernel']
    return jnp.mean((hidden @ params['second']['kernel'] - targets) ** 2)

  @jax.jit
  def step(params, moments, state, inputs, targets):
    gradients = jax.grad(loss)(params, inputs, targets)
    updates, moments = optimizer.update(gradients, moments, params)
    params, state = method.apply(
      optax.apply_updates(params, updates), seed, state
    )
    return params, moments, state

  carry = seed, optimizer.init(seed), state
  for inputs, targets in zip(*_batches(), strict=True):
    carry = step(*carry, inputs, targets)
    yield carry[0]


def _random_mask():
  """Returns our random method, its state, and name -> mask, bool [in, out]."""
  method = projection.SubsetProjection(
    EPSILON, 'random', silos='per_tensor', random_seed=3
  )
  seed = _seed()
  moved = jax.tree.map(lambda x: x + 1, seed)
  projected, _ = method.apply(moved, seed, method.init(seed))
  return (
    method,
    method.init(seed),
    {n: np.asarray(projected[n]['kernel'] != seed[n]['kernel']) for n in seed},
  )


def _with_mask(mask):
  """Returns a method of a fixed mask, name -> bool [in, out], and its state.

  Without churn, the state holds what was chosen for good.
  """
  method = projection.SubsetProjection(EPSILON, silos='per_tensor', churn=False)
  tree = {name: {'kernel': jnp.asarray(m)} for name, m in mask.items()}
  state = method.init(_seed())
  return method, state._replace(chosen=(masks.pack(tree), jnp.asarray(True)))


def _supplied(mask):
  """Returns PEFT's model with a mask of ours."""
  by_shape = {m.T.shape: m.T for m in mask.values()}
  with pytest.warns(UserWarning, match='supply your own masking function'):
    config = peft.ShiraConfig(
      r=1, mask_type='ours', target_modules=list(SHAPES)
    )
  config.mask_fn = lambda layer, r, **_: torch.from_numpy(
    by_shape[tuple(layer.weight.shape)].astype(np.float32)
  )
  return peft.get_peft_model(_their_network(), config)


def _drawn():
  """Returns PEFT's model with its own random mask."""
  config = peft.ShiraConfig(r=1, random_seed=5, target_modules=list(SHAPES))
  return peft.get_peft_model(_their_network(), config)


def _saved_mask(folder):
  """Returns the mask in a folder of PEFT, name -> bool [in, out]."""
  tensors = safetensors_numpy.load_file(folder / 'adapter_model.safetensors')
  mask = {name: np.zeros(shape, bool) for name, shape in SHAPES.items()}
  for name in SHAPES:
    rows, columns = tensors[f'base_model.model.{name}.shira_indices']
    mask[name][columns, rows] = True
  return mask


def _compare(model, method, state, mask, optimizer):
  """Trains both, compares each step; returns the last parameters of ours."""
  ours, theirs = OPTIMIZERS[optimizer]
  seed = _seed()
  steps = list(_our_steps(method, state, ours))
  largest = 0.0
  for params, weights in zip(steps, _their_steps(model, theirs), strict=True):
    for name, weight in weights.items():
      kernel = np.asarray(params[name]['kernel'])
      np.testing.assert_array_equal(kernel != seed[name]['kernel'], mask[name])
      assert not (weight != seed[name]['kernel'])[~mask[name]].any()
      largest = max(largest, np.abs(kernel - weight).max())
  assert largest < 1e-5
  for name in SHAPES:  # It is no comparison of seeds.
    moved = np.abs(steps[-1][name]['kernel'] - seed[name]['kernel'])
    assert moved[mask[name]].mean() > 0.05
  return jax.tree.map(np.asarray, steps[-1])


@pytest.mark.parametrize('optimizer', OPTIMIZERS)
def test_with_our_random_mask(optimizer, tmp_path):
  method, state, mask = _random_mask()
  assert [int(m.sum()) for m in mask.values()] == [BUDGET, BUDGET]
  model = _supplied(mask)
  last = _compare(model, method, state, mask, optimizer)
  # Our subset, which PEFT loads, is what PEFT trained.
  subset = subsets.extract(last, _seed())
  shira_files.save(tmp_path / 'ours', subset, _seed(), REFERENCE, STEPS)
  loaded = peft.PeftModel.from_pretrained(_their_network(), tmp_path / 'ours')
  for name in SHAPES:
    layers = (m.base_model.model.get_submodule(name) for m in (loaded, model))
    indices, expected = (x.shira_indices['default'] for x in layers)
    assert torch.equal(indices, expected)
    difference = _weight(loaded, name) - _weight(model, name)
    assert np.abs(difference).max() < 1e-5


@pytest.mark.parametrize('optimizer', OPTIMIZERS)
def test_with_the_random_mask_of_peft(optimizer, tmp_path):
  model = _drawn()
  model.save_pretrained(tmp_path / 'mask')
  mask = _saved_mask(tmp_path / 'mask')
  last = _compare(model, *_with_mask(mask), mask, optimizer)
  # What PEFT trained, which we load, is our subset.
  model.save_pretrained(tmp_path / 'theirs')
  params, note = shira_files.load(tmp_path / 'theirs', _seed())
  assert note.startswith(f'{2 * BUDGET} deltas of SHiRA')
  merged = model.merge_and_unload()
  for name in SHAPES:
    weight = merged.get_submodule(name).weight.detach().numpy().T
    np.testing.assert_array_equal(params[name]['kernel'], weight)
    assert np.abs(last[name]['kernel'] - weight).max() < 1e-5


def test_another_mask_is_told_apart():
  method, state, mask = _random_mask()
  other = {name: np.roll(m, 1) for name, m in mask.items()}
  with pytest.raises(AssertionError):
    _compare(_supplied(other), method, state, mask, 'sgd')
