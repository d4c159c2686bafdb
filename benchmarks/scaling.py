"""How the projection's share of a step, and what it sends, scale.

  python benchmarks/scaling.py --json scaling.json

Training steps of T5 1.1 on 1, 2, 4 and 8 virtual devices of the CPU, as many
rows for each, full fine-tuning and DST in turn, so that both see the same
machine; medians. The devices divide the rows (`data`), or the parameters too
(`fsdp`). Virtual devices share the cores: steps take longer the more there are,
and only the shares say something.

Then, for models of several widths, what the compiled programs send between
devices: what of it the projection adds to a step, and what it sends in all,
which is the same for any width.
"""

import argparse
import collections
import json
import os
import subprocess
import sys
import time
from typing import Any

import jax
import numpy as np
import tables

from dst_t5x.core import json_text
from dst_t5x.engine import optimizers
from dst_t5x.engine import parameters
from dst_t5x.engine import partitioning
from dst_t5x.engine import trainer as trainer_lib
from dst_t5x.method import projection
from dst_t5x.models.t5 import network
from dst_t5x.planning import collectives

PyTree = Any
_METHODS = ('full', 'dst')
_WARM = 3
_LAYERS = 2


class Steps:
  """One method's step on a mesh, compiled, with its state and times."""

  def __init__(
    self, method: str, width: int, mesh: str, rows: int, epsilon: float
  ) -> None:
    self._partitioner = partitioning.Partitioner(
      1, jax.device_count() if mesh == 'fsdp' else 1
    )
    model = network.Transformer(_config(width))
    trainer = trainer_lib.Trainer(
      model,
      optimizers.adafactor(lambda step: 1e-2),
      projection.SubsetProjection(epsilon)
      if method == 'dst'
      else projection.NoProjection(),
    )
    space = parameters.ParameterSpace(model, self._partitioner)
    state_shardings = self._partitioner.like_parameters(
      jax.eval_shape(trainer.init, space.shapes), space.shapes, space.shardings
    )
    everywhere = self._partitioner.replicated
    with self._partitioner.activate():
      seed = space.initialize(0)
      self.state = jax.jit(trainer.init, out_shardings=state_shardings)(
        space.initialize(0)
      )
      constants = trainer_lib.Constants(seed=seed if method == 'dst' else ())
      step = jax.jit(
        trainer.train_step,
        donate_argnums=0,
        out_shardings=(state_shardings, everywhere),
      )
      self._rest = (
        constants,
        self._partitioner.place_batch(
          _batch(rows * jax.device_count(), model.config.vocab_size)
        ),
        self._partitioner.key(0),
        np.bool_(False),
      )
      self._step = step.lower(self.state, *self._rest).compile()
    self.sent = collections.Counter(collectives.find_all(self._step.as_text()))
    self.times: list[float] = []
    self.passes: list[int] = []

  def __call__(self) -> None:
    """Takes a step and times it."""
    start = time.perf_counter()
    self.state, metrics = self._step(self.state, *self._rest)
    jax.block_until_ready((self.state, metrics))
    self.times.append(time.perf_counter() - start)
    assert not int(metrics['refused_steps']), 'the loss is not finite'
    if self.state.projection_state:
      self.passes.append(int(self.state.projection_state.passes))


def _config(width: int) -> network.T5Config:
  return network.T5Config(
    vocab_size=64 * width,
    emb_dim=width,
    num_heads=8,
    num_encoder_layers=_LAYERS,
    num_decoder_layers=_LAYERS,
    head_dim=width // 8,
    mlp_dim=2 * width,
    mlp_activations=('gelu', 'linear'),
    dropout_rate=0.0,
  )


def _batch(rows: int, vocab_size: int) -> dict[str, np.ndarray]:
  random = np.random.default_rng(0)
  inputs = random.integers(2, vocab_size, (rows, 64)).astype(np.int32)
  targets = random.integers(2, vocab_size, (rows, 32)).astype(np.int32)
  return {
    'encoder_input_tokens': inputs,
    'decoder_input_tokens': np.roll(targets, 1, axis=1),
    'decoder_target_tokens': targets,
    'decoder_loss_weights': np.ones_like(targets),
  }


def measure(
  mesh: str, width: int, rows: int, steps: int, epsilon: float
) -> dict[str, Any]:
  """Returns the row of one mesh, in this process."""
  methods = {m: Steps(m, width, mesh, rows, epsilon) for m in _METHODS}
  for _ in range(_WARM + steps if steps else 0):
    for method in methods.values():
      method()
  seconds = {
    m: float(np.median(steps.times[_WARM:])) if steps.times else None
    for m, steps in methods.items()
  }
  full, dst = (methods[m] for m in _METHODS)
  parameters_in_all = sum(x.size for x in jax.tree.leaves(dst.state.params))
  return {
    'devices': jax.device_count(),
    'mesh': mesh,
    'width': width,
    'parameters': parameters_in_all,
    'silos': len(dst.state.projection_state.thresholds),
    'passes': float(np.median(dst.passes[_WARM:])) if dst.passes else None,
    'seconds': seconds,
    'sent_by_full': sum(c.bytes * n for c, n in full.sent.items()),
    'added': [
      [*collective, times]
      for collective, times in (dst.sent - full.sent).items()
    ],
    'taken_away': [
      [*collective, times]
      for collective, times in (full.sent - dst.sent).items()
    ],
  }


def _in_process(
  options: argparse.Namespace, devices: int, mesh: str, width: int, steps: int
) -> dict[str, Any]:
  """Returns the row of one mesh; JAX knows its devices only once."""
  done = subprocess.run(
    [
      *(sys.executable, __file__, '--in-process'),
      *(f'--meshes={mesh}', f'--widths={width}', f'--steps={steps}'),
      *(f'--rows={options.rows}', f'--epsilon={options.epsilon}'),
    ],
    env=os.environ
    | {
      'JAX_PLATFORMS': 'cpu',
      'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}',
    },
    stdout=subprocess.PIPE,
    text=True,
    check=True,
  )
  return json.loads(done.stdout.splitlines()[-1])


def show_times(options: argparse.Namespace) -> list[dict[str, Any]]:
  """Prints and returns the rows of all meshes."""
  rows = []
  print('devices  mesh  s full  s dst  projection  passes')
  for mesh in options.meshes:
    for devices in options.devices:
      row = _in_process(options, devices, mesh, options.width, options.steps)
      full, dst = row['seconds']['full'], row['seconds']['dst']
      row['share'] = (dst - full) / dst
      rows.append(row)
      print(
        f'{devices:>7}  {mesh:<5} {full:6.3f} {dst:6.3f}  '
        f'{row["share"]:>9.1%}  {row["passes"]:.1f}',
        flush=True,
      )
  return rows


def show_sent(options: argparse.Namespace) -> list[dict[str, Any]]:
  """Prints and returns what is sent, for all widths."""
  rows = []
  devices = max(options.devices)
  print(f'\nsent on {devices} devices, bytes; of a loop, once\n')
  print('mesh   parameters  silos  by full       added by the projection')
  for mesh in options.meshes:
    for width in options.widths:
      row = _in_process(options, devices, mesh, width, 0)
      rows.append(row)
      added = ', '.join(
        f'{n} {operation} {types} ({size})'
        for operation, types, size, n in row['added']
      )
      print(
        f'{mesh:<5} {row["parameters"]:>11,}  {row["silos"]:>5}  '
        f'{row["sent_by_full"]:>11,}  {added or "nothing"}',
        flush=True,
      )
  return rows


def main() -> None:
  """Measures all and prints tables."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--devices', type=int, nargs='+', default=[1, 2, 4, 8])
  parser.add_argument('--meshes', nargs='+', default=['data', 'fsdp'])
  parser.add_argument('--width', type=int, default=256)
  parser.add_argument('--widths', type=int, nargs='+', default=[32, 64, 128])
  parser.add_argument('--rows', type=int, default=4, help='for each device')
  parser.add_argument(
    '--steps', type=int, default=12, help='0: only what is sent'
  )
  parser.add_argument('--epsilon', type=float, default=1e-3)
  parser.add_argument('--json', help='writes the rows there')
  parser.add_argument('--in-process', action='store_true')
  options = parser.parse_args()
  if options.in_process:
    [mesh], [width] = options.meshes, options.widths
    row = measure(mesh, width, options.rows, options.steps, options.epsilon)
    print(json_text.dumps(row))
    return
  rows = show_times(options) if options.steps else []
  tables.write_json(options.json, rows + show_sent(options))


if __name__ == '__main__':
  main()
