"""Kinds and numbers of accelerators: `v4:4x4x4`, `v5e:2x2`, `h200:8`, `cpu`."""

import dataclasses
import math
import re

from dst_t5x.core import machine
from dst_t5x.core.errors import UserError, nearest

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Accelerator:
  """A device of JAX, with values of the vendor's data sheet.

  Attributes:
    memory: approximate bytes that a program can use.
    flops: peak rate of dense bfloat16 products, operations per second; 0 if
      unknown.
  """

  memory: int
  flops: float


# Each core of a v2 or v3 is a device; later TPUs are one device a chip.
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
    text: the user's text.
    kind: a key of `ACCELERATORS`, or `CPU`.
    devices: number of devices.
    accelerator: one of the devices.
  """

  text: str
  kind: str
  devices: int
  accelerator: Accelerator

  @property
  def devices_of_host(self) -> int:
    """The number of devices of one machine."""
    return min(self.devices, _OF_HOST.get(self.kind, self.devices))


def parse(text: str) -> Topology:
  """Returns the topology of a text such as `v4:4x4x4`; `cpu` is one device.

  Raises:
    UserError: there is no such topology.
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
  if kind == CPU:  # All devices belong to one machine.
    accelerator = Accelerator(accelerator.memory // devices, 0.0)
  if kind in ('v2', 'v3') and 'x' in shape:
    devices *= 2
  return Topology(text, kind, devices, accelerator)
