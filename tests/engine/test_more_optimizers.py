"""AdamW and Muon, against torch and by property."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dst_t5x.engine import optimizers


def _params():
  random = np.random.default_rng(0)

  def tensor(*shape):
    return jnp.asarray(random.standard_normal(shape), jnp.float32)

  return {
    'token_embedder': {'embedding': tensor(9, 4)},
    'decoder': {
      'layers': {'mlp': {'wi': {'kernel': tensor(3, 4, 6)}}},
      'norm': {'scale': tensor(4)},
    },
    'encoder': {'layers_0': {'mlp': {'wi': {'kernel': tensor(4, 6)}}}},
  }


def _run(optimizer, params, steps):
  state = optimizer.init(params)
  for i in range(steps):
    gradients = jax.tree.map(lambda x, i=i: jnp.cos(x + i), params)
    updates, state = optimizer.update(gradients, state, params, i)
    params = jax.tree.map(jnp.add, params, updates)
  return params


def test_adamw_is_torch_s():
  params = _params()
  ours = _run(optimizers.adamw(lambda _: 0.01, weight_decay=0.1), params, 5)
  theirs = [
    torch.nn.Parameter(torch.tensor(np.asarray(x)))
    for x in jax.tree.leaves(params)
  ]
  optimizer = torch.optim.AdamW(theirs, 0.01, weight_decay=0.1)
  for i in range(5):
    for x in theirs:
      x.grad = torch.cos(x.detach() + i)
    optimizer.step()
  for a, b in zip(jax.tree.leaves(ours), theirs, strict=True):
    np.testing.assert_allclose(a, b.detach().numpy(), atol=2e-6)


def test_muon_makes_each_layer_s_update_orthogonal():
  optimizer = optimizers.muon(lambda _: 1.0, consistent_rms=None)
  params = _params()
  gradients = jax.tree.map(jnp.cos, params)
  updates, _ = optimizer.update(gradients, optimizer.init(params), params, 0)
  kernels = [
    updates['encoder']['layers_0']['mlp']['wi']['kernel'],
    *updates['decoder']['layers']['mlp']['wi']['kernel'],
  ]
  for kernel in kernels:
    s = np.linalg.svd(kernel, compute_uv=False)
    # Five Newton-Schulz steps bring singular values near 1, not to it.
    assert s.min() / s.max() > 0.6
  # The others get AdamW's first step, as large for all (Nesterov's momentum
  # makes it larger than the learning rate).
  for update in (
    updates['token_embedder']['embedding'],
    updates['decoder']['norm']['scale'],
  ):
    assert np.ptp(np.abs(update)) < 1e-3 < 1 < np.abs(update).min()


@pytest.mark.parametrize('make', [optimizers.adamw, optimizers.muon])
def test_scanned_and_unscanned_layers_train_equally(make):
  kernels = _params()['decoder']['layers']['mlp']['wi']['kernel']
  stacked = {'s': {'layers': {'mlp': {'kernel': kernels}}}}
  apart = {
    's': {f'layers_{i}': {'mlp': {'kernel': k}} for i, k in enumerate(kernels)}
  }
  optimizer = make(lambda _: 0.1)
  a, b = (_run(optimizer, params, 3) for params in (stacked, apart))
  np.testing.assert_allclose(
    a['s']['layers']['mlp']['kernel'],
    np.stack([b['s'][f'layers_{i}']['mlp']['kernel'] for i in range(3)]),
    atol=1e-5,
  )
