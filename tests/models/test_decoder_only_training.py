"""Full fine-tuning of decoder-only networks, beside torch's."""

import decoder_only
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dst_t5x.core import parts
from dst_t5x.engine import losses
from dst_t5x.engine import optimizers
from dst_t5x.engine import trainer as trainer_lib
from dst_t5x.method import projection
from dst_t5x.models.decoder_only import hf_names

torch = pytest.importorskip('torch')
pytest.importorskip('transformers')

STEPS = 20
_SGD = (
  lambda rate: optax.sgd(rate),
  lambda params, rate: torch.optim.SGD(params, rate),
  0.3,
)
_ADAMW = (
  lambda rate: optax.adamw(rate, weight_decay=0.05),
  lambda params, rate: torch.optim.AdamW(params, rate, weight_decay=0.05),
  0.003,
)


def _batches():
  """Yields rows of prompts and targets, the next token of each and its weight.

  Torch gives an embedding that it takes for padding no gradient, so that there
  are no tokens 0 and 1.
  """
  random = np.random.default_rng(0)
  for step in range(STEPS):
    size = 8 + step % 3
    rows = random.integers(2, decoder_only.VOCAB, (4, size + 1), np.int32)
    rows[:, 4:] = rows[:, 3:4]  # What can be learnt.
    weights = (np.arange(size) >= np.array([[2], [3], [5], [6]])) * np.int32(1)
    yield rows[:, :-1], rows[:, 1:], weights


def _our_losses(model, params, make, rate):
  trainer = trainer_lib.Trainer(
    model,
    optimizers.Optimizer(make, lambda step: jnp.float32(rate)),
    projection.NoProjection(),
    losses.Loss(z_loss=0.0),
  )
  state = trainer.init(jax.tree.map(jnp.asarray, params))
  step = jax.jit(trainer.train_step)
  found = []
  for inputs, targets, weights in _batches():
    batch = {
      'decoder_input_tokens': inputs,
      'decoder_target_tokens': targets,
      'decoder_loss_weights': weights,
    }
    state, metrics = step(
      state,
      trainer_lib.Constants((), {}),
      batch,
      jax.random.key(0),
      jnp.asarray(False),
    )
    found.append(float(metrics['loss']))
  return found, parts.flatten(state.params)


def _their_losses(other, make, rate):
  optimizer = make(other.parameters(), rate)
  found = []
  for inputs, targets, weights in _batches():
    labels = np.where(weights, targets, -100).astype(np.int64)
    logits = other(torch.from_numpy(inputs).long()).logits
    loss = torch.nn.functional.cross_entropy(
      logits.flatten(0, 1), torch.from_numpy(labels).flatten()
    )
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    found.append(loss.item())
  return found


@pytest.mark.parametrize(
  ('family', 'optimizer'),
  [('llama3', _SGD), ('llama3', _ADAMW), ('gemma3', _SGD), ('qwen2', _ADAMW)],
)
def test_losses_of_20_steps_equal_torchs(family, optimizer):
  ours, theirs, rate = optimizer
  model = decoder_only.tiny(family)
  params = decoder_only.random_params(model)
  other = decoder_only.peer(model, params).train()
  found, tuned = _our_losses(model, params, ours, rate)
  expected = _their_losses(other, theirs, rate)
  np.testing.assert_allclose(found, expected, rtol=1e-3)
  seed = parts.flatten(params)
  layout = hf_names.layout(model.config)
  for name, parameter in other.named_parameters():
    tensor = layout[name]
    array = parameter.detach().numpy()
    array = array.T if tensor.transposed else array
    moved = np.linalg.norm(tuned[tensor.path] - seed[tensor.path])
    assert moved > 1e-3 * np.linalg.norm(array), name
    error = np.linalg.norm(tuned[tensor.path] - array)
    assert error < 0.02 * moved, name
