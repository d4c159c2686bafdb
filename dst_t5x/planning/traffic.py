"""What a training step sends between devices, by collective and by cause.

The step is compiled for as many virtual CPUs, as `estimate` does it.
"""

import collections
from collections.abc import Sequence
import contextlib
import os
import re
import tempfile
from typing import NamedTuple

import jax

from dst_t5x.config import binaries
from dst_t5x.planning import collectives
from dst_t5x.planning import least as least_lib
from dst_t5x.planning import programs
from dst_t5x.planning import topologies
from dst_t5x.planning import work

_TASK = 'gin/tasks/gsm8k.gin'
_LENGTHS = {'inputs': 256, 'targets': 320}  # Of gin/tasks/gsm8k.gin.
_WARNING = 'Involuntary full rematerialization'
# What stands in the names of operations beside the modules' own names.
_NOT_MODULES = re.compile(
  r'jit\(\w*\)|jvp\(\w*\)|transpose\(jvp\(\w*\)\)|while|body|closed_call|'
  r'checkpoint|rematted_computation|cond|branch_\d+_fun|[\w.]*\._?\w+|'
  r'Transformer\.\w+|layers(_\d+)?'
)
_OTHER = 'other'


class Row(NamedTuple):
  """What some collectives send.

  Attributes:
    collective: the operation.
    cause: what for: a phase of the step, and a module.
    bytes: sent by a device; see `collectives.sent`.
    bytes_as_is: the same without what accelerators' compilers improve.
  """

  collective: str
  cause: str
  bytes: float
  bytes_as_is: float


def prepare(topology: topologies.Topology) -> None:
  """Makes JAX have the devices; call this before JAX looks for any."""
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_num_cpu_devices', topology.devices)


def lower(
  model: str,
  topology: topologies.Topology,
  method: str = 'full',
  flags: Sequence[str] = (),
  names: Sequence[str] = (programs.TRAINING,),
  layers: int | None = None,
) -> dict[str, programs.Program]:
  """Returns name -> program of a model of `gin/models` on GSM8K's lengths.

  Args:
    model: the name of a gin file.
    topology: the devices; see `prepare`.
    method: the name of a gin file.
    flags: further flags of training.
    names: see `programs.lower`.
    layers: see `programs.lower`.

  Raises:
    UserError: there is no such file, or a flag is invalid.
  """
  command = [
    f'--gin_file=gin/models/{model}.gin',
    f'--gin_file={_TASK}',
    f'--gin_file=gin/methods/{method}.gin',
    '--gin_file=gin/runs/finetune.gin',
    *flags,
  ]
  host = topology.devices_of_host, topology.accelerator.memory
  call = binaries.parse(work.with_files(command), programs.lower)
  return call(names=names, host=host, layers=layers)  # type: ignore[call-arg]


def rows(text: str) -> list[Row]:
  """Returns what a compiled training step sends, the most first.

  Args:
    text: the program's text.
  """
  sums: dict[tuple[str, str], list[float]] = collections.defaultdict(
    lambda: [0.0, 0.0]
  )
  for one in collectives.sent(text):
    total = sums[one.operation, cause(one.op_name)]
    total[0] += one.bytes
    total[1] += one.bytes_as_is
  found = [Row(*key, *total) for key, total in sums.items()]
  return sorted(found, key=lambda row: -row.bytes)


def cause(op_name: str) -> str:
  """Returns what an operation is for: `backward, mlp/wi_0`.

  Args:
    op_name: XLA's name, `jit(train_step)/…`. Of several operations that became
      one, the first names the cause.
  """
  if not op_name:
    return _OTHER
  if 'rematted_computation' in op_name:
    phase = 'recomputed'
  elif 'transpose(' in op_name:
    phase = 'backward'
  else:
    phase = 'forward' if 'jvp(' in op_name else 'update'
  first = op_name.replace('(transpose', 'transpose').split(':')[0]
  names = [
    name.strip('()')
    for name in first.split('/')
    if not _NOT_MODULES.fullmatch(name.strip('()'))
  ]
  # The last one is the operation's own.
  return f'{phase}, {"/".join(names[:-1][-2:]) or _OTHER}'


@contextlib.contextmanager
def warnings() -> collections.abc.Iterator[list[str]]:
  """Collects XLA's warnings that it replicates an array on all devices.

  XLA writes to the file descriptor of standard error, if TF_CPP_MIN_LOG_LEVEL
  was at most 1 when it was loaded. All that it writes is withheld.
  """
  found: list[str] = []
  saved = os.dup(2)
  with tempfile.TemporaryFile('w+', errors='replace') as file:
    os.dup2(file.fileno(), 2)
    try:
      yield found
    finally:
      os.dup2(saved, 2)
      os.close(saved)
      file.seek(0)
      found.extend(line for line in file if _WARNING in line)


def least(program: programs.Program) -> dict[str, float]:
  """Returns cause -> the least that a device sends; see `planning.least`."""
  return least_lib.least(program, _LENGTHS)
