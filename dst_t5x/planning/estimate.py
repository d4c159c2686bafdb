"""Estimates what a training step needs on each device, and if it fits."""

from collections.abc import Sequence
import dataclasses
import re
from typing import NamedTuple

import jax

from dst_t5x.config import binaries
from dst_t5x.config import gin_files
from dst_t5x.core.errors import UserError
from dst_t5x.engine import parameters
from dst_t5x.engine import partitioning
from dst_t5x.engine import sources
from dst_t5x.engine import trainer as trainer_lib
from dst_t5x.planning import collectives
from dst_t5x.planning import memory as memory_lib
from dst_t5x.planning import topologies
from dst_t5x.planning import work as work_lib

_COLUMNS = tuple(field.name for field in dataclasses.fields(memory_lib.Memory))
_SIZES = tuple(
  f'gin/models/t5_1_1_{size}.gin'
  for size in ('small', 'base', 'large', 'xl', 'xxl')
)
_NOTE = """\
GiB on one device. gradients: with updates and new parameters. activations:
what the backward pass needs, and the gradients that exist at its start,
which are all gradients if layers are stacked. total has the larger of the
two, as they do not exist at the same time. XLA: the compiler's plan for
CPUs. Except with --topology=cpu, it is made without what only CPUs need:
YNNPACK, and copies of bfloat16 values in float32."""


class Estimate(NamedTuple):
  """The estimate for one command.

  Attributes:
    memory: bytes by our count.
    compiled: the compiler's plan; None if it was not asked.
    work: steps, tokens and operations.
    mesh: axis -> number of devices.
  """

  memory: memory_lib.Memory
  compiled: memory_lib.Compiled | None
  work: work_lib.Work
  mesh: dict[str, int]


def estimate(
  trainer: trainer_lib.Trainer,
  train_data: sources.TrainData,
  partitioner: partitioning.Partitioner,
  work: work_lib.Work,
  compile: bool = True,
  host: tuple[int, int] | None = None,
  is_for_cpu: bool = True,
) -> Estimate:
  """Estimates a step on all devices that JAX has, without allocating memory.

  Args:
    trainer: network and method.
    train_data: batch size and lengths.
    partitioner: the mesh.
    work: the run's work.
    compile: whether to compile the step too.
    host: devices and memory of a process, which decide the mesh as in training;
      see `partitioning.Host`.
    is_for_cpu: see `memory.compiled`.

  Raises:
    UserError: a batch cannot be divided among the devices.
  """
  partitioner = parameters.choose_mesh(
    trainer.network,
    partitioner,
    partitioning.IN_TRAINING,
    partitioning.Host(*host) if host else None,
  )
  trainer.check_batch_size(train_data.batch_size)
  partitioner.check_batch_size(train_data.batch_size, trainer.microbatches)
  batch = trainer.network.batch_shapes(
    train_data.feature_lengths, train_data.batch_size, train_data.pack
  )
  phase, step, counted = _largest_phase(trainer, partitioner, batch)
  compiled = None
  if compile:
    with partitioner.activate():
      compiled = memory_lib.compiled(phase, step, is_for_cpu)
  return Estimate(counted, compiled, work, dict(partitioner.mesh.shape))


def _largest_phase(
  trainer: trainer_lib.Trainer,
  partitioner: partitioning.Partitioner,
  batch: dict[str, tuple[int, int]],
) -> tuple[trainer_lib.Trainer, memory_lib.Step, memory_lib.Memory]:
  """Returns the phase of the method that needs the most memory, and its step.

  Args:
    trainer: network and method.
    partitioner: the mesh.
    batch: feature of the model -> [batch, length].
  """
  found = []
  for start in trainer.projection.phase_starts:
    phase = trainer.at(start)
    with partitioner.activate():
      step = memory_lib.abstract_step(phase, partitioner, batch)
    # Outside, where the network is not constrained: constraints keep nothing.
    memory = memory_lib.count(phase, step, partitioner.mesh)
    found.append((phase, step, memory))
  return max(found, key=lambda phase: phase[2].total)


def main(argv: Sequence[str]) -> None:
  """Prints the estimate for the command that the arguments describe.

  Raises:
    UserError: an argument is invalid.
  """
  flags, topology = _split(argv)
  # This has to come before JAX looks for devices.
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_num_cpu_devices', topology.devices)
  host = topology.devices_of_host, topology.accelerator.memory
  is_first = True
  for name, more in _variants(flags):
    arguments = [
      *work_lib.with_files(more),
      f'--gin.estimate.host={host}',
      f'--gin.estimate.is_for_cpu={topology.kind == topologies.CPU}',
    ]
    result = binaries.parse(arguments, estimate)()
    if is_first:
      print(_title(topology, result))
    print(_row(name, result, topology), flush=True)
    if result.compiled is not None and result.compiled.collectives:
      sent = collectives.describe(result.compiled.collectives)
      print(f'  the projection sends: {sent}')
    is_first = False
  print(_NOTE)


def _split(argv: Sequence[str]) -> tuple[list[str], topologies.Topology]:
  """Returns the other arguments, and the topology of --topology."""
  flags, text = [], 'cpu'
  for argument in argv:
    if argument.startswith('--topology'):
      text = argument.partition('=')[2]
      if not text:
        raise UserError(f'{argument} needs a value: --topology=v4:4x4x4')
    else:
      flags.append(argument)
  return flags, topologies.parse(text)


def _variants(flags: Sequence[str]) -> list[tuple[str, list[str]]]:
  """Returns the name and the flags of each command to estimate.

  Without a file for the size or the method, all sizes or methods are estimated.
  """
  files = [
    flag.partition('=')[2] for flag in flags if flag.startswith('--gin_file=')
  ]

  def others(kind: str, all_of_them: Sequence[str]) -> Sequence[str | None]:
    """Returns the files to add, one for each command; [None] for no file."""
    # A user's own file may set the size and the method.
    known = [name for name in files if re.search(r'(^|/)gin/\w+/', name)]
    is_there = any(f'gin/{kind}/' in name for name in known)
    return [None] if is_there or known != files else all_of_them

  methods = [n for n in gin_files.shipped() if n.startswith('gin/methods/')]
  is_pretraining = any(name.endswith('runs/pretrain.gin') for name in files)
  variants = []
  for model in others('models', _SIZES):
    for method in [None] if is_pretraining else others('methods', methods):
      words = [_name(name) for name in (model, *files, method) if name]
      more = [f'--gin_file={model}'] if model else []
      last = [f'--gin_file={method}'] if method else []
      variants.append((' '.join(words), [*more, *flags, *last]))
  return variants


def _name(file: str) -> str:
  """Returns the name of a file in the table: `xl` for …/t5_1_1_xl.gin."""
  name = file.rpartition('/')[2].removesuffix('.gin')
  return name.removeprefix('t5_1_1_')


def _title(topology: topologies.Topology, result: Estimate) -> str:
  mesh = ' × '.join(f'{n} {axis}' for axis, n in result.mesh.items())
  gib = topology.accelerator.memory / topologies.GIB
  columns = ' '.join(f'{name:>11}' for name in _COLUMNS)
  return (
    f'{topology.text}: {topology.devices} device(s) of {gib:.3g} GiB, {mesh}; '
    f'{result.work.tokens_per_step:,} tokens a step\n'
    f'{"":28} {columns} {"total":>9} {"XLA":>9}  fits'
  )


def _row(name: str, result: Estimate, topology: topologies.Topology) -> str:
  def gib(size: int) -> str:
    return f'{size / topologies.GIB:.2f}'

  counted = result.memory
  columns = ' '.join(f'{gib(getattr(counted, name)):>11}' for name in _COLUMNS)
  planned = result.compiled.memory if result.compiled else None
  needed = max(counted.total, planned or 0)
  fits = 'yes' if needed < topology.accelerator.memory else 'NO'
  return (
    f'{name:28} {columns} {gib(counted.total):>9} '
    f'{"-" if planned is None else gib(planned):>9}  {fits}'
  )
