"""The group of processes that this process belongs to, from the environment.

The first of these that applies decides:

  COORDINATOR_ADDRESS, NUM_PROCESSES, PROCESS_ID   set by hand or by a script;
                                                   `JAX_…` is also accepted
  a Slurm step of several tasks                    srun
  a Cloud TPU                                      VMs, pods, GKE
  an indexed Job of Kubernetes, or a JobSet        GKE with GPUs

In all cases but the first, JAX finds the other processes. If none applies, the
process is alone. JOIN_TIMEOUT is the number of seconds that a process waits for
the others, 300 by default.
"""

from collections.abc import Mapping
import glob
import importlib.util
from typing import NamedTuple

from dst_t5x.core.errors import UserError

_BY_HAND = ('COORDINATOR_ADDRESS', 'NUM_PROCESSES', 'PROCESS_ID')
_SLURM = ('SLURM_JOB_ID', 'SLURM_STEP_NODELIST', 'SLURM_NTASKS',
          'SLURM_PROCID', 'SLURM_LOCALID')  # fmt: skip
_KUBERNETES = ('KUBERNETES_SERVICE_HOST', 'JOB_COMPLETION_INDEX')


class Group(NamedTuple):
  """The processes that work together.

  Attributes:
    how: the kind of environment, for the log.
    coordinator: `host:port` of process 0; None if JAX finds it.
    processes: the number of processes; None if JAX finds it.
    process: the index of this process; None if JAX finds it.
    timeout: seconds that processes wait for each other to start.
  """

  how: str
  coordinator: str | None = None
  processes: int | None = None
  process: int | None = None
  timeout: int = 300


def find_group(
  environment: Mapping[str, str], has_tpu: bool = False
) -> Group | None:
  """Returns the group of this process; None if it is alone.

  Args:
    environment: variables.
    has_tpu: see `has_tpu`.

  Raises:
    UserError: variables are missing or invalid.
  """
  group = _find(environment, has_tpu)
  if group is None or not environment.get('JOIN_TIMEOUT'):
    return group
  timeout = _number('JOIN_TIMEOUT', environment['JOIN_TIMEOUT'])
  return group._replace(timeout=timeout)


def _find(environment: Mapping[str, str], has_tpu: bool) -> Group | None:
  """Returns the group with the default timeout."""
  variables = {name: _variable(environment, name) for name in _BY_HAND}
  if any(variables.values()):
    return _by_hand(variables)
  if all(name in environment for name in _SLURM):
    several = int(environment['SLURM_NTASKS']) > 1
    return Group('Slurm') if several else None
  if has_tpu:
    return Group('Cloud TPU')
  if all(name in environment for name in _KUBERNETES):
    if importlib.util.find_spec('kubernetes') is None:
      raise UserError(
        'this is one of the pods of an indexed Job, and JAX needs the package '
        "kubernetes to find the others: pip install 'jax[k8s]', or set "
        + ', '.join(_BY_HAND)
      )
    return Group('Kubernetes')
  return None


def has_tpu(environment: Mapping[str, str]) -> bool:
  """Returns whether JAX will run on TPUs of this machine."""
  platforms = environment.get('JAX_PLATFORMS', '')
  return (
    (not platforms or 'tpu' in platforms.split(','))
    and importlib.util.find_spec('libtpu') is not None
    and bool(glob.glob('/dev/accel[0-9]*') or glob.glob('/dev/vfio/[0-9]*'))
  )


def _variable(environment: Mapping[str, str], name: str) -> str:
  return environment.get(name) or environment.get(f'JAX_{name}') or ''


def _by_hand(variables: Mapping[str, str]) -> Group | None:
  """Returns the group that the variables `_BY_HAND` describe."""
  missing = [name for name, value in variables.items() if not value]
  if missing:
    given = [name for name, value in variables.items() if value]
    raise UserError(
      f'set {" and ".join(missing)} too, or not {" and ".join(given)}: several '
      'processes need all three, one process none'
    )
  address = variables['COORDINATOR_ADDRESS']
  host, _, port = address.rpartition(':')
  if not host or not port.isdigit():
    raise UserError(
      f'COORDINATOR_ADDRESS must be HOST:PORT of process 0; it is {address!r}'
    )
  processes = _number('NUM_PROCESSES', variables['NUM_PROCESSES'])
  process = _number('PROCESS_ID', variables['PROCESS_ID'])
  if processes < 1 or process >= processes:
    raise UserError(
      f'PROCESS_ID must be one of 0 to NUM_PROCESSES - 1; it is {process}, and '
      f'NUM_PROCESSES is {processes}'
    )
  if processes == 1:
    return None
  return Group('COORDINATOR_ADDRESS', address, processes, process)


def _number(name: str, text: str) -> int:
  if not text.isdigit():
    raise UserError(f'{name} must be a whole number; it is {text!r}')
  return int(text)
