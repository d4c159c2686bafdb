"""Our engine and genuine T5X, on the same work, in one run.

  python benchmarks/engines.py --json engines.json

T5 1.1 Small with random parameters and AdaFactor, on random tokens, in float32:
training (full fine-tuning, and DST), teacher-forced evaluation, greedy
decoding, the time until the first step is done (the seed from disk to the
devices, compilation, the step), and saving a checkpoint. The engines take
turns, so that both see the same machine; times are medians. T5X has to be
importable: see docs/t5x.md. It trains our network (`t5x`), as with
gin/t5x/finetune.gin, and its own (`t5x_own`).
"""

import argparse
from collections.abc import Callable, Iterator
import dataclasses
import pathlib
import tempfile
import time
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import seqio
from t5x import checkpoints as t5x_checkpoints
import tables
import works

from dst_t5x import subsets
from dst_t5x.checkpoints import run_folder
from dst_t5x.checkpoints import seeds
from dst_t5x.checkpoints import state_keys
from dst_t5x.checkpoints import t5x_checkpoint
from dst_t5x.engine import losses
from dst_t5x.engine import optimizers
from dst_t5x.engine import trainer as trainer_lib
from dst_t5x.method import projection as projection_lib
from dst_t5x.models import decoding
from dst_t5x.models.t5 import network as network_lib
from dst_t5x.t5x import loop
from dst_t5x.t5x import model as model_lib

PyTree = Any

_ENGINES = ('ours', 't5x', 't5x_own')
_TASK = 'engines'
_LEARNING_RATE = 0.01
_WORK = works.make('t5_1_1_small')
_COLUMNS = ('metric', 'method', *_ENGINES, 'unit', 'times_t5x')


def _network(dropout: float) -> network_lib.Transformer:
  return network_lib.Transformer(
    dataclasses.replace(_WORK.network.config, dropout_rate=dropout)
  )


class Ours:
  """Our engine: what `python -m dst_t5x.train` does with arrays."""

  def __init__(
    self,
    seed: pathlib.Path,
    projection: projection_lib.Projection,
    batch: trainer_lib.Batch,
    dropout: float,
    folder: pathlib.Path,
  ) -> None:
    start = time.perf_counter()
    self._network = _network(dropout)
    self._projection = projection
    trainer = trainer_lib.Trainer(
      self._network,
      optimizers.adafactor(optimizers.schedule(_LEARNING_RATE)),
      projection,
    )
    loaded = seeds.load_seed(seed)
    self._seed, self._identity = loaded.params, loaded.fingerprint
    kept = jax.tree.map(jnp.asarray, loaded.params)
    self._state = jax.jit(trainer.init)(jax.tree.map(jnp.copy, kept))
    self._constants = trainer_lib.Constants(
      kept if projection.keep_seed else ()
    )
    self._rest = (jax.random.key(0), jnp.asarray(False))
    step: Any = jax.jit(trainer.train_step, donate_argnums=0)
    self._step = step.lower(
      self._state, self._constants, batch, *self._rest
    ).compile()
    self.train(batch)
    self.first_step = time.perf_counter() - start
    self._evaluate = jax.jit(
      lambda params, batch: (
        losses.forward(self._network, trainer.loss, params, batch).loss
      )
    )
    self._decode = jax.jit(
      lambda params, tokens, length: decoding.GreedyDecoder()(
        self._network, params, tokens, length
      )[0],
      static_argnums=2,
    )
    self._folder = run_folder.RunFolder(folder)
    self._path = folder
    self._steps = 0

  def train(self, batch: trainer_lib.Batch) -> None:
    """Takes a step."""
    self._state, _ = self._step(
      self._state, self._constants, batch, *self._rest
    )
    jax.block_until_ready(self._state.params)

  def evaluate(self, batch: trainer_lib.Batch) -> None:
    """Computes the loss of a batch, without dropout."""
    self._evaluate(self._state.params, batch).block_until_ready()

  def decode(self, batch: trainer_lib.Batch) -> int:
    """Decodes greedily; returns the number of tokens."""
    tokens = self._decode(
      self._state.params,
      batch['encoder_input_tokens'],
      batch['decoder_target_tokens'].shape[1],
    )
    return int(jnp.sum(tokens != 0))

  def save(self) -> int:
    """Does what `run.Run.save` does; returns the bytes."""
    self._steps += 1
    if self._projection.constrains:
      found = subsets.extract(self._state.params, self._seed, self._identity)
      saved = subsets.to_arrays(found)
    else:
      saved = {'dense': self._state.params}
    changing = {
      'optimizer': self._state.opt_state,
      'projection': self._state.projection_state,
    }
    about = {'adapter': {'kind': 'Adapter'}, 'is_partial': False}
    state = state_keys.flatten(changing, self._state.params)
    self._folder.save(self._steps, saved, state, b'0', about)
    self._folder.wait()
    return _bytes(self._path)

  def close(self) -> None:
    """Ends what runs in the background."""
    self._folder.close()


class T5X:
  """Genuine T5X's trainer, model and checkpoints, with our plug-in."""

  def __init__(
    self,
    seed: pathlib.Path,
    projection: projection_lib.Projection,
    batch: trainer_lib.Batch,
    dropout: float,
    folder: pathlib.Path,
    own: bool,
  ) -> None:
    start = time.perf_counter()
    network: Any = _network(dropout)
    network = model_lib.t5x_own(network) if own else network
    self._trainer = loop.trainer(
      network,
      projection,
      _TASK,
      str(seed),
      batch,
      lambda step: _LEARNING_RATE,
    )
    self._partitioner = self._trainer._partitioner
    self._state = self._trainer.train_state
    self._step = self._partitioner.compile(
      self._trainer._partitioned_train_step, self._state, batch
    )
    self.train(batch)
    self.first_step = time.perf_counter() - start
    self._decode = self._partitioner.partition(
      self._trainer._model.predict_batch,
      in_axis_resources=(
        self._trainer._train_state_axes.params,
        self._partitioner.data_partition_spec,
      ),
      out_axis_resources=None,
    )
    self._checkpointer = t5x_checkpoints.Checkpointer(
      jax.eval_shape(lambda: self._state), self._partitioner, str(folder)
    )
    self._path = folder

  def train(self, batch: trainer_lib.Batch) -> None:
    """Takes a step."""
    self._state, _ = self._step(self._state, batch)
    jax.block_until_ready(self._state.params)

  def evaluate(self, batch: trainer_lib.Batch) -> None:
    """Computes the loss of a batch, without dropout."""
    with self._partitioner.mesh:
      jax.block_until_ready(
        self._trainer._partitioned_eval_step(self._state, batch)
      )

  def decode(self, batch: trainer_lib.Batch) -> int:
    """Decodes greedily; returns the number of tokens."""
    with self._partitioner.mesh:
      tokens = self._decode(self._state.params, batch)
    return int(jnp.sum(tokens != 0))

  def save(self) -> int:
    """Writes T5X's native format; returns the bytes."""
    before = _bytes(self._path)
    self._state = self._state.replace_step(self._state.step + 1)
    self._checkpointer.save(self._state)
    return _bytes(self._path) - before

  def close(self) -> None:
    """Ends what runs in the background."""
    self._trainer.close()


def _bytes(folder: pathlib.Path) -> int:
  return sum(f.stat().st_size for f in folder.rglob('*') if f.is_file())


def _add_task() -> None:
  """Registers a task for its vocabulary alone; nothing is read from it."""
  feature = seqio.Feature(seqio.ByteVocabulary())
  seqio.TaskRegistry.add(
    _TASK,
    source=seqio.FunctionDataSource(_no_rows, splits=['train']),
    output_features={'inputs': feature, 'targets': feature},
    metric_fns=[],
  )


def _no_rows(split: str, shuffle_files: bool, seed: int | None = None) -> Any:
  raise NotImplementedError(f'{split=} {shuffle_files=} {seed=}')


def _measure(
  method: str,
  projection: projection_lib.Projection,
  seed: pathlib.Path,
  options: argparse.Namespace,
) -> Iterator[tables.Row]:
  """Yields a row for each metric and engine."""
  random = np.random.default_rng(0)

  def batch() -> trainer_lib.Batch:
    sizes = {
      'rows': options.batch_size,
      'inputs': options.inputs,
      'targets': options.targets,
    }
    return dataclasses.replace(_WORK, **sizes).batch(random)

  with tempfile.TemporaryDirectory() as folder:
    folders = {name: pathlib.Path(folder) / name for name in options.engines}
    common = seed, projection, batch(), options.dropout
    engines: dict[str, Any] = {
      name: Ours(*common, folders[name])
      if name == 'ours'
      else T5X(*common, folders[name], name == 't5x_own')
      for name in options.engines
    }
    tokens = options.batch_size * options.targets
    for metric, function, amount in (
      ('training', 'train', 1),
      ('evaluation', 'evaluate', tokens),
      ('decoding', 'decode', None),
    ):
      rates = _rates(engines, function, amount, batch, options.repetitions)
      unit = 'steps/s' if metric == 'training' else 'tokens/s'
      for name, rate in rates.items():
        yield _row(metric, method, name, rate, unit)
    for name, engine in engines.items():
      yield _row('first_step', method, name, engine.first_step, 's')
    saves = {name: _saves(engine) for name, engine in engines.items()}
    for name, (seconds, size) in saves.items():
      yield _row('save_time', method, name, seconds, 's')
      yield _row('checkpoint', method, name, size, 'bytes')
    for engine in engines.values():
      engine.close()


def _rates(
  engines: dict[str, Any],
  function: str,
  amount: int | None,
  batch: Callable[[], trainer_lib.Batch],
  repetitions: int,
) -> dict[str, float]:
  """Returns what is done in a second: steps, or tokens."""
  times: dict[str, list[float]] = {name: [] for name in engines}
  done = dict.fromkeys(engines, 0.0)
  for i in range(repetitions + 2):
    shared = batch()
    for name, engine in engines.items():
      seconds, result = tables.seconds(getattr(engine, function), shared)
      done[name] = amount or result
      if i > 1:  # The first ones compile, and fill the caches.
        times[name].append(seconds)
  medians = tables.medians(times)
  return {name: done[name] / medians[name] for name in engines}


def _saves(engine: Any) -> tuple[float, int]:
  """Returns the median time of saving, and the bytes of a checkpoint."""
  results = [tables.seconds(engine.save) for _ in range(3)]
  return sorted(seconds for seconds, _ in results)[1], results[0][1]


def _row(
  metric: str, method: str, engine: str, value: float, unit: str
) -> tables.Row:
  return {
    'metric': metric,
    'method': method,
    'engine': engine,
    'value': value,
    'unit': unit,
    'work': 't5_1_1_small',
  }


def _table(rows: list[tables.Row]) -> list[tables.Row]:
  """Returns a row for each metric, the engines beside each other."""
  table: dict[tuple[str, str], tables.Row] = {}
  for row in rows:
    line = table.setdefault((row['metric'], row['method']), dict(row))
    line[row['engine']] = row['value']
  for line in table.values():
    if {'ours', 't5x'} <= line.keys():
      ratio = line['ours'] / line['t5x']
      is_rate = line['unit'].endswith('/s')
      line['times_t5x'] = ratio if is_rate else 1 / ratio
  return list(table.values())


def main() -> None:
  """Measures, and prints the table."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--batch-size', type=int, default=8)
  parser.add_argument('--inputs', type=int, default=128)
  parser.add_argument('--targets', type=int, default=32)
  parser.add_argument('--dropout', type=float, default=0.1)
  parser.add_argument('--epsilon', type=float, default=1e-4)
  parser.add_argument('--repetitions', type=int, default=10)
  parser.add_argument(
    '--engines', nargs='+', choices=_ENGINES, default=_ENGINES
  )
  parser.add_argument('--json')
  options = parser.parse_args()
  _add_task()
  rows: list[tables.Row] = []
  with tempfile.TemporaryDirectory() as folder:
    params = jax.device_get(works.params(_network(0.0)))
    params = flax.core.unfreeze(params)
    seed = t5x_checkpoint.save(folder, params, 1_000_000)
    del params
    for method, projection in (
      ('full', projection_lib.NoProjection()),
      ('dst', projection_lib.SubsetProjection(epsilon=options.epsilon)),
    ):
      rows += _measure(method, projection, pathlib.Path(seed), options)
      tables.write_json(options.json, rows)
  tables.show(_table(rows), _COLUMNS)


if __name__ == '__main__':
  main()
