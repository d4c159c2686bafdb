"""Every method memorises 32 real rows of RTE, from a trained seed."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dst_t5x.adapters import api as adapters
from dst_t5x.adapters import dora
from dst_t5x.adapters import ia3
from dst_t5x.adapters import lora
from dst_t5x.adapters import pissa
from dst_t5x.adapters import prompts
from dst_t5x.adapters import vera
from dst_t5x.core import parts
from dst_t5x.engine import optimizers
from dst_t5x.engine import parameters
from dst_t5x.engine import trainer as trainer_lib
from dst_t5x.method import family
from dst_t5x.method import projection
from dst_t5x.models import adapted
from dst_t5x.models import api
from dst_t5x.models.t5 import network

CONFIG = network.T5Config(
  vocab_size=264,
  emb_dim=128,
  num_heads=4,
  num_encoder_layers=1,
  num_decoder_layers=1,
  head_dim=16,
  mlp_dim=128,
  mlp_activations=('gelu', 'linear'),
  dropout_rate=0.0,
)
_LENGTHS = {'inputs': 64, 'targets': 16}
_EVERY = 20  # Steps between two looks.


def _batch(rows, prefix=()):
  """Returns the features of (inputs, targets), as bytes."""
  inputs, targets = (
    np.array(
      [
        np.pad([byte + 3 for byte in text], (0, length - len(text)))
        for text in texts
      ],
      np.int32,
    )
    for texts, length in zip(
      zip(*rows, strict=True), _LENGTHS.values(), strict=True
    )
  )
  placeholders = np.tile(np.array(prefix, np.int32), (len(rows), 1))
  return {
    'encoder_input_tokens': np.hstack([placeholders, inputs]),
    'decoder_input_tokens': np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
    'decoder_target_tokens': targets,
    'decoder_loss_weights': (targets > 0).astype(np.int32),
  }


@pytest.fixture(scope='module')
def rows(shared_data):
  """Rows of RTE as bytes: the hypothesis, which is short, and the label."""
  lines = (shared_data / 'super_glue/RTE/train.jsonl').read_text().splitlines()
  return [
    (
      f'{row["hypothesis"]} {row["premise"]}'.encode()[: _LENGTHS['inputs']],
      row['label'].encode(),
    )
    for row in map(json.loads, lines)
  ]


def _states(trainer, params, constants, batches, steps):
  """Yields step, parameters and loss at intervals."""
  state = jax.jit(trainer.at(0).init)(params)
  for i in range(steps):
    if i in trainer.projection.phase_starts:
      phase = trainer.at(i)
      keeps = phase.projection.keep_seed
      constants = constants._replace(seed=params if keeps else ())
      state = jax.jit(phase.enter)(state, params) if i else state
      step = jax.jit(phase.train_step, donate_argnums=0)
    state, metrics = step(
      state, constants, batches[i % len(batches)], jax.random.key(0),
      jnp.asarray(False),
    )  # fmt: skip
    if (i + 1) % _EVERY == 0:
      yield state.params, float(metrics['loss'])


@pytest.fixture(scope='module')
def seed(rows):
  """A model trained on the two labels and on rows after the first 32."""
  model = network.Transformer(CONFIG)
  params = jax.jit(model.initialize)(jax.random.key(0))['params']
  trainer = _trainer(model, 0.01, projection.NoProjection())
  batches = [_batch(rows[i : i + 64]) for i in range(32, 672, 64)]
  states = _states(trainer, params, trainer_lib.Constants(), batches, 160)
  params, loss = list(states)[-1]
  assert loss < 0.2
  return jax.device_get(params)


def _trainer(model, learning_rate, projection, trained=None, decay_steps=None):
  decay = 'linear' if decay_steps else 'constant'
  schedule = optimizers.schedule(
    learning_rate, decay=decay, decay_steps=decay_steps
  )
  return trainer_lib.Trainer(
    model, optimizers.adafactor(schedule), projection, trained=trained
  )


@functools.partial(jax.jit, static_argnums=0)
def _logits(model, params, batch):
  return model.logits(params, batch)


def _is_learnt(model, params, batch, loss):
  """Returns whether each label's first byte is the most probable one."""
  first = np.argmax(_logits(model, params, batch)[:, 0], axis=-1)
  return loss < 0.05 and (first == batch['decoder_target_tokens'][:, 0]).all()


_ALL = projection.NoProjection()
_NO_CHURN = projection.SubsetProjection(1e-2, churn=False)
_RANDOM = projection.SubsetProjection(1e-2, distance='random')
_HEAD = ['decoder/logits_dense/kernel']


# Method -> learning rate, and settings for a short run.
_FAMILY = {
  'shira_random': (0.1, {}),
  'shira_magnitude': (0.1, {}),
  'super_tuning': (0.1, {'end': 'smallest'}),
  'pafi': (0.1, {}),
  'shira_snip': (0.1, {}),
  'fish': (0.1, {}),
  'child_tuning': (0.1, {}),
  'lt_sft': (0.1, {'first_steps': 40, 'first_rate': 0.03}),
  'spiel': (0.1, {}),
  'id3': (0.1, {'grow_steps': 100}),
  'gasdu': (0.1, {}),
  'nano_adam': (0.1, {}),
  'lift': (0.1, {'rank': 8}),
}


def _sparse(name):
  rate, settings = _FAMILY[name]
  method = family.make(name, 1e-2, steps=400, **settings)
  return _slow(adapters.NONE, (rate, method), 400, id=name)


def _slow(*arguments, id):
  return pytest.param(*arguments, marks=pytest.mark.slow, id=id)


@pytest.mark.parametrize(
  ('adapter', 'options', 'steps'),
  [
    pytest.param(
      adapters.NONE, (0.1, projection.SubsetProjection(1e-2)), 400, id='dst'
    ),
    pytest.param(lora.LoRA(), (0.3, _ALL), 400, id='lora'),
    pytest.param(
      lora.LoRA(rank_stabilized=True), (0.1, _ALL), 400, id='rslora'
    ),
    pytest.param(dora.DoRA(), (0.1, _ALL), 400, id='dora'),
    pytest.param(pissa.PiSSA(), (0.1, _ALL), 400, id='pissa'),
    pytest.param(vera.VeRA(), (0.1, _ALL), 400, id='vera'),
    pytest.param(ia3.IA3(), (0.1, _ALL), 400, id='ia3'),
    pytest.param(adapters.NONE, (0.1, _ALL, ['.*norm/scale']), 400, id='norms'),
    _slow(adapters.NONE, (0.01, _ALL), 400, id='full'),
    _slow(adapters.NONE, (0.1, _NO_CHURN), 400, id='dst_no_churn'),
    _slow(adapters.NONE, (0.3, _RANDOM), 400, id='random'),
    _slow(prompts.Prompt(length=100), (0.3, _ALL), 1000, id='prompt'),
    _slow(adapters.NONE, (0.05, _ALL, _HEAD, 3000), 3000, id='head_only'),
    *map(_sparse, _FAMILY),
  ],
)
def test_32_rows_are_learnt(rows, seed, adapter, options, steps):
  model = adapted.with_adapter(network.Transformer(CONFIG), adapter)
  params = seed
  if adapter.added:
    params = parameters.with_fixed(model, api.shapes(model), seed)
    added = parameters.initialize_added(model, params, 1, list)
    params = parts.join(params, added)
  trainer = _trainer(model, *options)
  mine, frozen = trainer.split(params)
  constants = trainer_lib.Constants(frozen=frozen or ())
  batch = _batch(rows[:32], adapter.prefix(model.vocab_size))
  assert not _is_learnt(model, params, batch, 0.0)
  assert any(
    _is_learnt(model, parts.join(tuned, frozen), batch, loss)
    for tuned, loss in _states(trainer, mine, constants, [batch], steps)
  )
