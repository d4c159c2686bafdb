"""How long a training step takes with each method: the paper's Fig. 5.

  python benchmarks/train_step.py --json train_step.json

T5 1.1 Small with random parameters and AdaFactor, on random tokens, one step
of each method in turn, so that all see the same machine. Times are medians of
the steps from the eleventh on; memory is what the compiler planned for:
arguments and temporaries.

Methods: `full`, no projection; `exact`, `iterative` (Algorithm 2, J = 10) and
`sort` thresholds at each ε; `rebuilt_seed`, which is `exact` without a copy of
the seed; `lora` of rank 8 on all attention matrices; `prompt` of length 10;
`ia3`, `norms` and `head_only`. With --peft also `peft_lora`, which is `lora` in
PyTorch with Hugging Face PEFT. On one GPU: --batch-size 128.
"""

import argparse
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import tables

from dst_t5x.adapters import api as adapters
from dst_t5x.adapters import ia3
from dst_t5x.adapters import lora
from dst_t5x.adapters import prompts
from dst_t5x.core import parts
from dst_t5x.engine import budget
from dst_t5x.engine import optimizers
from dst_t5x.engine import trainer as trainer_lib
from dst_t5x.method import projection
from dst_t5x.models import adapted
from dst_t5x.models import api
from dst_t5x.models.t5 import network

PyTree = Any

_WARM = 10
_SLOW_STEPS = 1  # Of `sort`, which takes many seconds on a CPU.
_PROJECTIONS: dict[str, dict[str, Any]] = {
  'exact': {},
  'rebuilt_seed': {'keep_seed': False},
  'iterative': {'threshold': 'iterative'},
  'sort': {'threshold': 'sort'},
}
_UNITS = {
  'seconds_per_step': 's',
  'relative_to_full': '',
  'memory': 'MiB',
  'arguments': 'MiB',
  'temporary_memory': 'MiB',
  'compile_s': 's',
}
_RANK = 8
_ADAPTERS: dict[str, adapters.Adapter] = {
  'lora': lora.LoRA(rank=_RANK, targets='.*attention/(query|key|value|out)'),
  'prompt': prompts.Prompt(length=10),
  'ia3': ia3.IA3(),
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
_PARTS = {
  'norms': [budget.NORMS],
  'head_only': [network.Transformer(SMALL).output_matrix],
}
_METHODS = [*_PROJECTIONS, *_ADAPTERS, *_PARTS]


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


def make_params(model: api.Network) -> PyTree:
  """Returns random parameters."""
  return jax.jit(model.initialize)(jax.random.key(0))['params']


class Stepper(Protocol):
  """What takes a step with a batch, and remembers how long each took."""

  times: list[float]
  figures: dict[str, float]  # What else is known: metric -> value.

  def __call__(self, batch: trainer_lib.Batch) -> None:
    """Takes a step."""


class Method:
  """A training step, compiled, with its state and its times."""

  def __init__(
    self, trainer: trainer_lib.Trainer, seed: PyTree, batch: trainer_lib.Batch
  ) -> None:
    model = trainer.network
    prefix = model.adapter.prefix(model.vocab_size)
    self._prefix = np.array(prefix, np.int32)
    params = seed
    if model.adapter.added:
      whole = parts.flatten(make_params(trainer.network))
      params = parts.unflatten(whole | parts.flatten(seed))
    mine, frozen = trainer.split(params)
    self._constants = trainer_lib.Constants(
      seed if trainer.projection.keep_seed else (), frozen
    )
    self._state = jax.jit(trainer.init)(jax.tree.map(jnp.copy, mine))
    self._rest = (jax.random.key(0), jnp.asarray(False))
    step: Callable[..., Any] = jax.jit(trainer.train_step, donate_argnums=0)
    lowered = step.lower(
      self._state, self._constants, self._prefixed(batch), *self._rest
    )
    compile_s, self._step = tables.seconds(lowered.compile)
    memory = self._step.memory_analysis()
    arguments = memory.argument_size_in_bytes / 2**20
    temporaries = memory.temp_size_in_bytes / 2**20
    self.figures = {
      'memory': arguments + temporaries,
      'arguments': arguments,
      'temporary_memory': temporaries,
      'compile_s': compile_s,
    }
    self.times: list[float] = []

  def _prefixed(self, batch: trainer_lib.Batch) -> trainer_lib.Batch:
    tokens = batch['encoder_input_tokens']
    prefixes = np.tile(self._prefix, (len(tokens), 1))
    return batch | {'encoder_input_tokens': jnp.hstack([prefixes, tokens])}

  def __call__(self, batch: trainer_lib.Batch) -> None:
    """Takes a step."""
    batch = jax.block_until_ready(self._prefixed(batch))
    taken, (self._state, _) = tables.seconds(
      self._step, self._state, self._constants, batch, *self._rest
    )
    self.times.append(taken)


def make_methods(
  seed: PyTree, batch: trainer_lib.Batch, options: argparse.Namespace
) -> Iterator[tuple[str, float | None, Stepper]]:
  """Yields each method's name, ε and compiled step."""

  def method(
    adapter: adapters.Adapter = adapters.NONE,
    trained: list[str] | None = None,
    after: projection.Projection | None = None,
  ) -> Method:
    trainer = trainer_lib.Trainer(
      network=adapted.with_adapter(network.Transformer(SMALL), adapter),
      optimizer=optimizers.adafactor(optimizers.schedule(0.001)),
      projection=after or projection.NoProjection(),
      trained=trained,
    )
    return Method(trainer, seed, batch)

  yield 'full', None, method()
  for name in options.methods:
    if name in _ADAPTERS:
      yield name, None, method(adapter=_ADAPTERS[name])
    elif name in _PARTS:
      yield name, None, method(trained=_PARTS[name])
    else:
      for epsilon in options.epsilon:
        after = projection.SubsetProjection(epsilon, **_PROJECTIONS[name])
        yield name, epsilon, method(after=after)
  if options.peft:
    import peft_step  # It needs torch.

    yield 'peft_lora', None, peft_step.PeftLora(SMALL, seed, _RANK)


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
    '--methods', nargs='+', default=_METHODS, choices=_METHODS
  )
  parser.add_argument('--peft', action='store_true', help='peft_lora as well')
  parser.add_argument('--steps', type=int, default=40)
  options = parser.parse_args()
  if options.steps <= _WARM + 1:
    parser.error(f'--steps must be above {_WARM + 1}')
  if options.peft and jax.default_backend() != 'cpu':
    parser.error('--peft is for CPUs: run with JAX_PLATFORMS=cpu')
  seed = make_params(network.Transformer(SMALL))
  random = np.random.default_rng(0)
  batches = [
    make_batch(random, options.batch_size, options.inputs, options.targets)
    for _ in range(4)
  ]
  methods: dict[tuple[str, float | None], Stepper] = {}
  for name, epsilon, method in make_methods(seed, batches[0], options):
    methods[name, epsilon] = method
    setting = '' if epsilon is None else f' ε = {epsilon:g}'
    print(f'ready: {name}{setting}', flush=True)
  for step in range(options.steps):
    for (name, _), method in methods.items():
      if name != 'sort' or step >= options.steps - _SLOW_STEPS:
        method(batches[step % len(batches)])
    if (step + 1) % 5 == 0:
      print(f'{step + 1} of {options.steps} steps', flush=True)
  found = _results(methods, options)
  tables.write_json(options.json, _rows(found, options))
  tables.show(found, ('method', 'epsilon', *_UNITS))


def _results(
  methods: dict[tuple[str, float | None], Stepper], options: argparse.Namespace
) -> list[tables.Row]:
  """Returns a row for each method."""
  taken = tables.medians(
    {
      key: method.times[-(options.steps - _WARM) :]
      for key, method in methods.items()
    }
  )
  return [
    {
      'method': name,
      'epsilon': epsilon,
      'seconds_per_step': taken[name, epsilon],
      'relative_to_full': taken[name, epsilon] / taken['full', None],
      **method.figures,
    }
    for (name, epsilon), method in methods.items()
  ]


def _rows(
  found: list[tables.Row], options: argparse.Namespace
) -> list[tables.Row]:
  """Returns a row for each method and metric."""
  return [
    {
      'work': 'train_step',
      'model': 't5_1_1_small',
      'method': row['method'],
      'epsilon': row['epsilon'],
      'metric': metric,
      'value': row[metric],
      'unit': unit,
      'batch_size': options.batch_size,
      'inputs': options.inputs,
      'targets': options.targets,
      'device': jax.devices()[0].device_kind,
    }
    for row in found
    for metric, unit in _UNITS.items()
    if metric in row
  ]


if __name__ == '__main__':
  main()
