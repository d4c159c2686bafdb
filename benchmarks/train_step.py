"""How long a training step takes with each method: the paper's Fig. 5.

  python benchmarks/train_step.py --json train_step.json

T5 1.1 Small with random parameters and AdaFactor, on random tokens, one step
of each method in turn, so that all see the same machine. Times are medians of
the steps from the eleventh on; memory is what the compiler planned for, beside
the arguments.

Methods: `full`, no projection; `exact`, `iterative` (Algorithm 2, J = 10) and
`sort` thresholds at each ε; `rebuilt_seed`, which is `exact` without a copy of
the seed. On one GPU: --batch-size 128.
"""

import argparse
from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tables

from dst_t5x import network
from dst_t5x import optimizers
from dst_t5x import projection
from dst_t5x import trainer as trainer_lib

PyTree = Any

_WARM = 10
_SLOW_STEPS = 1  # Of `sort`, which takes many seconds on a CPU.
_CHOICES: dict[str, dict[str, Any]] = {
  'exact': {},
  'rebuilt_seed': {'keep_seed': False},
  'iterative': {'threshold': 'iterative'},
  'sort': {'threshold': 'sort'},
}
SMALL = network.T5Config(
  vocab_size=32128,
  emb_dim=512,
  num_heads=6,
  num_encoder_layers=8,
  num_decoder_layers=8,
  head_dim=64,
  mlp_dim=1024,
  mlp_activations=('gelu', 'linear'),
  dropout_rate=0.0,
)


def make_batch(
  random: np.random.Generator, rows: int, inputs: int, targets: int
) -> trainer_lib.Batch:
  """Returns random tokens, no padding."""
  encoder = random.integers(2, 32000, (rows, inputs)).astype(np.int32)
  decoder = random.integers(2, 32000, (rows, targets)).astype(np.int32)
  return {
    'encoder_input_tokens': jnp.asarray(encoder),
    'decoder_input_tokens': jnp.asarray(np.roll(decoder, 1, axis=1)),
    'decoder_target_tokens': jnp.asarray(decoder),
    'decoder_loss_weights': jnp.ones(decoder.shape, jnp.int32),
  }


def make_params(model: network.Transformer) -> PyTree:
  """Returns random parameters."""
  tokens = jnp.ones((1, 8), jnp.int32)
  init = jax.jit(functools.partial(model.init, enable_dropout=False))
  return init(jax.random.key(0), tokens, tokens, tokens)['params']


class Method:
  """A training step, compiled, with its state and its times."""

  def __init__(
    self, trainer: trainer_lib.Trainer, seed: PyTree, batch: trainer_lib.Batch
  ) -> None:
    self._fixed = trainer_lib.Fixed(
      seed if trainer.projection.keep_seed else ()
    )
    self._state = jax.jit(trainer.init)(jax.tree.map(jnp.copy, seed))
    self._rest = (jax.random.key(0), jnp.asarray(False))
    step: Callable[..., Any] = jax.jit(trainer.train_step, donate_argnums=0)
    lowered = step.lower(self._state, self._fixed, batch, *self._rest)
    self.compile_s, self._step = tables.seconds(lowered.compile)
    memory = self._step.memory_analysis()
    self.temporary_bytes = memory.temp_size_in_bytes
    self.argument_bytes = memory.argument_size_in_bytes
    self.times: list[float] = []

  def __call__(self, batch: trainer_lib.Batch) -> None:
    """Takes a step."""
    taken, (self._state, _) = tables.seconds(
      self._step, self._state, self._fixed, batch, *self._rest
    )
    self.times.append(taken)


def make_methods(
  seed: PyTree, batch: trainer_lib.Batch, options: argparse.Namespace
) -> dict[tuple[str, float | None], Method]:
  """Compiles one step for each method and ε."""
  projections: dict[tuple[str, float | None], projection.Projection] = {
    ('full', None): projection.NoProjection()
  }
  for epsilon in options.epsilon:
    for name in options.methods:
      projections[name, epsilon] = projection.SubsetProjection(
        epsilon, **_CHOICES[name]
      )
  return {
    key: Method(
      trainer_lib.Trainer(
        network=network.Transformer(SMALL),
        optimizer=optimizers.adafactor(optimizers.schedule(0.001)),
        projection=method,
      ),
      seed,
      batch,
    )
    for key, method in projections.items()
  }


def main() -> None:
  """Measures, prints, writes."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--json', metavar='FILE', help='write the rows here')
  parser.add_argument('--batch-size', type=int, default=8)
  parser.add_argument('--inputs', type=int, default=128, help='tokens a row')
  parser.add_argument('--targets', type=int, default=32, help='tokens a row')
  parser.add_argument('--epsilon', nargs='+', type=float, default=[1e-4, 1e-2])
  parser.add_argument(
    '--methods', nargs='+', default=list(_CHOICES), choices=list(_CHOICES)
  )
  parser.add_argument('--steps', type=int, default=40)
  options = parser.parse_args()
  if options.steps <= _WARM + 1:
    parser.error(f'--steps must be above {_WARM + 1}')
  seed = make_params(network.Transformer(SMALL))
  random = np.random.default_rng(0)
  batches = [
    make_batch(random, options.batch_size, options.inputs, options.targets)
    for _ in range(4)
  ]
  methods = make_methods(seed, batches[0], options)
  for step in range(options.steps):
    for (name, _), method in methods.items():
      if name != 'sort' or step >= options.steps - _SLOW_STEPS:
        method(batches[step % len(batches)])
  rows = _rows(methods, options)
  tables.write_json(options.json, rows)
  tables.show(
    rows, ('method', 'epsilon', 'metric', 'value', 'unit', 'batch_size')
  )


def _rows(
  methods: dict[tuple[str, float | None], Method], options: argparse.Namespace
) -> list[tables.Row]:
  taken = tables.medians(
    {
      key: method.times[-(options.steps - _WARM) :]
      for key, method in methods.items()
    }
  )
  rows = []
  for (name, epsilon), method in methods.items():
    seconds = taken[name, epsilon]
    values = {
      'seconds_per_step': (seconds, 's'),
      'relative_to_full': (seconds / taken['full', None], ''),
      'temporary_memory': (method.temporary_bytes / 2**20, 'MiB'),
      'arguments': (method.argument_bytes / 2**20, 'MiB'),
      'compile_s': (method.compile_s, 's'),
    }
    rows += [
      {
        'work': 'train_step',
        'model': 't5_1_1_small',
        'method': name,
        'epsilon': epsilon,
        'metric': metric,
        'value': value,
        'unit': unit,
        'batch_size': options.batch_size,
        'inputs': options.inputs,
        'targets': options.targets,
        'device': jax.devices()[0].device_kind,
      }
      for metric, (value, unit) in values.items()
    ]
  return rows


if __name__ == '__main__':
  main()
