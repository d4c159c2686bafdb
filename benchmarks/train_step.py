"""How long a training step takes with each method: the paper's Fig. 5.

  python benchmarks/train_step.py --json train_step.json --figure fig5.png
  python benchmarks/train_step.py --from train_step.json --figure fig5.png
  python benchmarks/train_step.py --model smollm2_135m --torch \
    --methods exact lora --epsilon 1e-4 --steps 20

A model with random parameters and AdaFactor, on random tokens, one step of each
method in turn, so that all see the same machine. Times are medians of the steps
after the warm ones; memory is what the compiler planned for: arguments and
temporaries.

Methods: `full`, no projection; `exact`, `iterative` (Algorithm 2, J = 10) and
`sort` thresholds at each ε; `rebuilt_seed`, which is `exact` without a copy of
the seed; `lora` of rank 8 on all attention matrices; `prompt` of length 10;
`ia3`, `norms` and `head_only`; with --family the other sparse methods at each
ε, in their last phase, ID3 while it grows. With --torch also `torch_full` and
`peft_lora`: the same steps in PyTorch, with transformers and Hugging Face PEFT.

On one GPU: --rows 128 --dtype bfloat16 --in-a-row 4, the paper's batch. There a
step is started while the one before runs; --in-a-row K waits once for K steps
and divides by K, so that what Python takes to start a step does not count
twice. --stacked scans over layers, which compiles one instead of all.
"""

import argparse
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
import dataclasses
import functools
import pathlib
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import tables
import works

from dst_t5x.adapters import api as adapters
from dst_t5x.adapters import ia3
from dst_t5x.adapters import lora
from dst_t5x.adapters import prompts
from dst_t5x.analysis import style
from dst_t5x.core import json_text
from dst_t5x.core import parts
from dst_t5x.engine import budget
from dst_t5x.engine import optimizers
from dst_t5x.engine import trainer as trainer_lib
from dst_t5x.method import api as method_api
from dst_t5x.method import family
from dst_t5x.method import projection
from dst_t5x.models import adapted

PyTree = Any

_SIZES = ('rows', 'inputs', 'targets')
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
_ADAPTERS = ('lora', 'prompt', 'ia3')
_PARTS = ('norms', 'head_only')
_OF_ALL = [*_PROJECTIONS, *_ADAPTERS, *_PARTS]
_METHODS = [*_OF_ALL, *family.METHODS]
_TORCH = {'torch_full': None, 'peft_lora': _RANK}  # Name -> rank of LoRA.


def _adapter(name: str, work: works.Work) -> adapters.Adapter:
  if name == 'lora':
    return lora.LoRA(rank=_RANK, targets=work.lora_targets)
  return prompts.Prompt(length=10) if name == 'prompt' else ia3.IA3()


def _trained(name: str, work: works.Work) -> list[str]:
  """Returns expressions over the paths of what is trained."""
  if name == 'norms':
    return [budget.NORMS]
  return [work.network.output_matrix or 'token_embedder/embedding']


class Stepper(Protocol):
  """What takes a step with a batch, and remembers how long each took."""

  times: list[float]
  figures: dict[str, float]  # What else is known: metric -> value.

  def compile(self) -> None:
    """Compiles the step, if there is something to compile."""

  def __call__(self, *batches: trainer_lib.Batch) -> None:
    """Takes steps in a row, and remembers how long each took on average."""


class Method:
  """A training step with its state and its times."""

  def __init__(
    self, trainer: trainer_lib.Trainer, seed: PyTree, work: works.Work
  ) -> None:
    batch = work.batch(np.random.default_rng(0))
    self._work = work
    model = trainer.network
    prefix = model.adapter.prefix(model.vocab_size)
    self._prefix = np.array(prefix, np.int32)
    params = seed
    if model.adapter.added:
      whole = parts.flatten(works.params(trainer.network))
      params = parts.unflatten(whole | parts.flatten(seed))
    mine, frozen = trainer.split(params)
    self._constants = trainer_lib.Constants(
      seed if trainer.projection.keep_seed else (), frozen
    )
    self._state = _first_state(trainer, jax.tree.map(jnp.copy, mine))
    self._rest = (jax.random.key(0), jnp.asarray(False))
    last = trainer.at(trainer.projection.phase_starts[-1]).program(mine)
    # As in training: ε is an argument of what is compiled.
    self._trainer = jax.device_put(last)
    step: Any = jax.jit(trainer_lib.Trainer.train_step, donate_argnums=1)
    self._lowered = step.lower(
      *(self._trainer, self._state, self._constants),
      *(self._prefixed(batch), *self._rest),
    )
    self.times: list[float] = []

  def compile(self) -> None:
    """Compiles the step."""
    compile_s, self._step = tables.seconds(self._lowered.compile)
    memory = self._step.memory_analysis()
    arguments = memory.argument_size_in_bytes / 2**20
    temporaries = memory.temp_size_in_bytes / 2**20
    self.figures = {
      'memory': arguments + temporaries,
      'arguments': arguments,
      'temporary_memory': temporaries,
      'compile_s': compile_s,
    }

  def _prefixed(self, batch: trainer_lib.Batch) -> trainer_lib.Batch:
    return self._work.prefixed(batch, self._prefix)

  def __call__(self, *batches: trainer_lib.Batch) -> None:
    """Takes steps in a row."""
    ready = jax.block_until_ready([self._prefixed(b) for b in batches])
    taken, _ = tables.seconds(self._in_a_row, ready)
    self.times.append(taken / len(batches))

  def _in_a_row(self, batches: list[trainer_lib.Batch]) -> Any:
    for batch in batches:
      self._state, metrics = self._step(
        *(self._trainer, self._state, self._constants, batch), *self._rest
      )
    return self._state, metrics


def _first_state(
  trainer: trainer_lib.Trainer, params: PyTree
) -> trainer_lib.TrainState:
  """Returns the state before a step of the method's last phase."""
  starts = trainer.projection.phase_starts
  if len(starts) == 1:
    return jax.jit(trainer.init)(params)
  # As if random numbers were the phase before: its state, or how far it moved.
  random = np.random.default_rng(0)
  noise = jax.tree.map(
    lambda x: random.standard_normal(x.shape, np.float32), params
  )
  state = (
    trainer.at(starts[-1])
    .init(params)
    ._replace(
      params=jax.tree.map(jnp.add, params, noise), projection_state=noise
    )
  )
  return jax.jit(trainer.at(starts[-1]).enter)(state, params)


# What `only` makes.
ALONE = ('full', 'exact', 'lora', 'torch_full', 'peft_lora')


def only(name: str, work: works.Work) -> Stepper:
  """Returns one method's step, ε = 1e-4, and holds no other."""
  seed = works.params(work.network)
  options = argparse.Namespace(
    methods=[name] if name in _METHODS else [],
    epsilon=[1e-4],
    torch=name in _TORCH,
  )
  found = make_methods(seed, work, options)
  step = next(make() for other, _, make in found if other == name)
  step.compile()
  return step


def make_methods(
  seed: PyTree, work: works.Work, options: argparse.Namespace
) -> Iterator[tuple[str, float | None, Callable[[], Stepper]]]:
  """Yields each method's name, its ε, and what compiles its step."""

  def method(
    adapter: adapters.Adapter = adapters.NONE,
    trained: list[str] | None = None,
    after: method_api.Projection | None = None,
  ) -> Callable[[], Stepper]:
    trainer = trainer_lib.Trainer(
      network=adapted.with_adapter(work.network, adapter),
      optimizer=optimizers.adafactor(optimizers.schedule(0.001)),
      projection=after or projection.NoProjection(),
      trained=trained,
    )
    return lambda: Method(trainer, seed, work)

  yield 'full', None, method()
  for name in options.methods:
    if name in _ADAPTERS:
      yield name, None, method(adapter=_adapter(name, work))
    elif name in _PARTS:
      yield name, None, method(trained=_trained(name, work))
    else:
      for epsilon in options.epsilon:
        yield name, epsilon, method(after=_projection(name, epsilon))
  for name in _TORCH if options.torch else ():
    yield name, None, functools.partial(_torch_step, work, seed, _TORCH[name])


def _projection(name: str, epsilon: float) -> method_api.Projection:
  if name in family.METHODS:
    return family.make(name, epsilon)
  return projection.SubsetProjection(epsilon, **_PROJECTIONS[name])


def _torch_step(work: works.Work, seed: PyTree, rank: int | None) -> Stepper:
  import torch_step

  step: Stepper = torch_step.TorchStep(work, seed, rank)
  return step


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add('--json', metavar='FILE', help='write the rows here')
  add('--figure', metavar='FILE', help='draw them here')
  add('--from', dest='source', metavar='FILE', help='only draw these rows')
  add('--model', nargs='+', default=['t5_1_1_small'], choices=works.NAMES,
      metavar='MODEL', help=f'of {", ".join(works.NAMES)}')  # fmt: skip
  add('--rows', type=int, help='of a batch')
  add('--inputs', type=int, help='tokens a row')
  add('--targets', type=int, help='tokens a row')
  add('--dtype', choices=['float32', 'bfloat16'], help='of activations')
  add('--stacked', action='store_true', help='scan over the layers')
  add('--epsilon', nargs='+', type=float, default=[1e-4, 1e-2])
  add('--methods', nargs='*', default=_OF_ALL, choices=_METHODS)
  add('--family', action='store_const', dest='methods',
      const=[*family.METHODS], help='the other sparse methods')  # fmt: skip
  add('--torch', action='store_true', help='PyTorch as well')
  add('--warm', type=int, default=10, help='steps not timed')
  add('--steps', type=int, default=40)
  add('--in-a-row', type=int, default=1, help='steps of one time')
  add('--compile-at-once', type=int, default=1, help='methods')
  return parser


def main() -> None:
  """Measures, prints, writes."""
  parser = _parser()
  options = parser.parse_args()
  if options.steps <= options.warm:
    parser.error(f'--steps must be above --warm, {options.warm}')
  if min(options.in_a_row, options.compile_at_once) < 1:
    parser.error('--in-a-row and --compile-at-once must be above 0')
  if options.torch and jax.default_backend() != 'cpu':
    parser.error('--torch is for CPUs: run with JAX_PLATFORMS=cpu')
  if options.source:
    rows = json_text.loads(pathlib.Path(options.source).read_text())
  else:
    rows = []
    for model in options.model:
      rows += measure(model, options)
      tables.write_json(options.json, rows)
  if options.figure:
    figure(rows, options.figure)


def measure(model: str, options: argparse.Namespace) -> list[tables.Row]:
  """Returns the rows of a model."""
  work = _work(model, options)
  seed = works.params(work.network)
  random = np.random.default_rng(0)
  batches = [work.batch(random) for _ in range(4)]
  methods: dict[tuple[str, float | None], Stepper] = {}
  for name, epsilon, make in make_methods(seed, work, options):
    methods[name, epsilon] = make()
  full, *others = methods.values()
  # First: what XLA finds out about products of matrices, it then knows for all.
  full.compile()
  with futures.ThreadPoolExecutor(options.compile_at_once) as pool:
    for _ in pool.map(lambda method: method.compile(), others):
      pass
  print(f'{model}: compiled', flush=True)
  for step in range(options.steps):
    for (name, _), method in methods.items():
      if name != 'sort' or step >= options.steps - _SLOW_STEPS:
        method(*(batches[i % 4] for i in range(options.in_a_row)))
    if (step + 1) % 5 == 0:
      print(f'{step + 1} of {options.steps} steps', flush=True)
  found = _results(methods, options)
  tables.show(found, ('method', 'epsilon', *_UNITS))
  return _rows(found, model, work)


def _work(model: str, options: argparse.Namespace) -> works.Work:
  """Returns the model's work, with the sizes that the options name."""
  changes = {'dtype': options.dtype} if options.dtype else {}
  if options.stacked:
    changes['scan_layers'] = True
  named = {name: getattr(options, name) for name in _SIZES}
  changed = {name: size for name, size in named.items() if size is not None}
  return dataclasses.replace(works.make(model, **changes), **changed)


def _results(
  methods: dict[tuple[str, float | None], Stepper], options: argparse.Namespace
) -> list[tables.Row]:
  """Returns a row for each method."""
  taken = tables.medians(
    {
      key: method.times[-(options.steps - options.warm) :]
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
  found: list[tables.Row], model: str, work: works.Work
) -> list[tables.Row]:
  """Returns a row for each method and metric."""
  config: Any = work.network.base
  return [
    {
      'work': 'train_step',
      'model': model,
      'method': row['method'],
      'epsilon': row['epsilon'],
      'metric': metric,
      'value': row[metric],
      'unit': unit,
      **{name: getattr(work, name) for name in _SIZES},
      'dtype': jnp.dtype(config.config.dtype).name,
      'stacked': work.network.scan_layers,
      'device': jax.devices()[0].device_kind,
    }
    for row in found
    for metric, unit in _UNITS.items()
    if metric in row
  ]


def figure(rows: Sequence[tables.Row], path: str) -> None:
  """Draws each model's steps per second, a bar for each method (Fig. 5)."""
  of_models: dict[str, dict[str, float]] = defaultdict(dict)
  for row in rows:
    if row.get('metric') == 'seconds_per_step':
      epsilon = row['epsilon']
      name = row['method'] + (f', ε = {epsilon:g}' if epsilon else '')
      # Only what ran in one process is comparable.
      what = [row['model'], f'batch {row["rows"]}', row['dtype']]
      what += ['stacked'] if row['stacked'] else []
      of_models[', '.join(what)][name] = 1 / row['value']
  if not of_models:
    raise SystemExit(f'error: no times of steps to draw in {path}')
  most = max(map(len, of_models.values()))
  with style.applied():
    drawn, axes = style.panels(
      len(of_models), height=1.6 + 0.55 * most, columns=1, width=7.0
    )
    for one, (model, rates) in zip(axes, of_models.items(), strict=True):
      one.barh([*rates], [*rates.values()], color='0.75', edgecolor='black',
               height=0.6)  # fmt: skip
      one.invert_yaxis()
      one.grid(visible=False, axis='y')
      one.set(title=model, xlabel='training steps per second')
    drawn.savefig(path)


if __name__ == '__main__':
  main()
