"""Accelerators, and how many: `v4:4x4x4`, `v5e:2x2`, `h200:8`, `cpu`."""

import dataclasses
import math
import re

from dst_t5x.core import machine
from dst_t5x.core.errors import UserError, nearest

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Accelerator:
  """One device as JAX sees it, from the vendor's data sheet.

  Attributes:
    memory: bytes that a program can have, about.
    flops: peak of dense bfloat16 products, operations a second; 0 if unknown.
  """

  memory: int
  flops: float


# A v2's or v3's core is a device of its own; later TPUs' chips are one device.
ACCELERATORS = {
  'v2': Accelerator(8 * GIB, 22.5e12),
  'v3': Accelerator(16 * GIB, 61.5e12),
  'v4': Accelerator(32 * GIB, 275e12),
  'v5e': Accelerator(16 * GIB, 197e12),
  'v5p': Accelerator(95 * GIB, 459e12),
  'v6e': Accelerator(32 * GIB, 918e12),
  'a100': Accelerator(40 * GIB, 312e12),
  'a100-80gb': Accelerator(80 * GIB, 312e12),
  'h100': Accelerator(80 * GIB, 989e12),
  'h200': Accelerator(141 * 10**9, 989e12),
}
CPU = 'cpu'
_OF_HOST = {'v2': 8, 'v3': 8, 'v4': 4, 'v5e': 4, 'v5p': 4, 'v6e': 4}
_OF_HOST |= dict.fromkeys(('a100', 'a100-80gb', 'h100', 'h200'), 8)


@dataclasses.dataclass(frozen=True)
class Topology:
  """Devices of one kind.

  Attributes:
    text: as it was written.
    kind: of `ACCELERATORS`, or `CPU`.
    devices: how many.
    accelerator: one of them.
  """

  text: str
  kind: str
  devices: int
  accelerator: Accelerator

  @property
  def devices_of_host(self) -> int:
    """How many devices a machine has, where there are several machines."""
    return min(self.devices, _OF_HOST.get(self.kind, self.devices))


def parse(text: str) -> Topology:
  """Returns what `v4:4x4x4` means; `cpu` is this machine, as one device.

  Raises:
    UserError: it means nothing.
  """
  kind, _, shape = text.lower().partition(':')
  known = [*ACCELERATORS, CPU]
  if kind not in known:
    raise UserError(
      f'--topology={text}: no accelerator {kind!r}{nearest(kind, known)} '
      f'(known: {", ".join(known)})'
    )
  if not re.fullmatch(r'([1-9]\d*(x[1-9]\d*)*)?', shape):
    raise UserError(
      f'--topology={text}: write {kind}:8, or the shape of a slice: {kind}:4x4'
    )
  devices = math.prod(int(n) for n in shape.split('x')) if shape else 1
  of_host = Accelerator(machine.host_memory(), 0.0)
  accelerator = ACCELERATORS.get(kind) or of_host
  if kind == CPU:  # All devices are parts of one machine.
    accelerator = Accelerator(accelerator.memory // devices, 0.0)
  if kind in ('v2', 'v3') and 'x' in shape:
    devices *= 2
  return Topology(text, kind, devices, accelerator)
