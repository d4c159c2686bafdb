"""The commands that start runs of a sweep, locally or elsewhere."""

from collections.abc import Sequence
import hashlib
import pathlib
import re
import shlex
import shutil
import subprocess

from dst_t5x.core.errors import UserError

_HERE = pathlib.Path(__file__).parent
_SCRIPTS = {'tpu': _HERE / 'tpu_pod.sh', 'gke': _HERE / 'gke.sh'}


def command(
  where: str, name: str, flags: Sequence[str], launcher: Sequence[str]
) -> str:
  """Returns the shell command that starts a run.

  Args:
    where: `local`, `slurm`, `tpu` or `gke`.
    name: the run's name.
    flags: training's flags.
    launcher: options of sbatch or of the script.
  """
  return shlex.join(arguments(where, name, flags, launcher))


def arguments(
  where: str, name: str, flags: Sequence[str], launcher: Sequence[str]
) -> list[str]:
  """Returns the command as a list; see `command`."""
  if where in _SCRIPTS:
    return [
      'bash', str(_SCRIPTS[where]), *launcher, f'--name={short_name(name)}',
      '--', *flags,
    ]  # fmt: skip
  train = ['python', '-m', 'dst_t5x.train', *flags]
  if where == 'slurm':
    return ['sbatch', *launcher, f'--wrap={shlex.join(train)}']
  return train


def short_name(name: str) -> str:
  """Returns a name for a cloud: a-z, 0-9 and hyphens, at most 39 characters."""
  digest = hashlib.sha256(name.encode()).hexdigest()[:6]
  words = re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')
  return f'r-{words[:30].strip("-")}-{digest}'


def check(where: str, launcher: Sequence[str]) -> None:
  """Makes the script check its options before any run is started.

  Raises:
    UserError: the script refuses them.
  """
  tool = {'tpu': 'gcloud', 'gke': 'xpk'}[where]
  if not shutil.which(tool):
    raise UserError(f'there is no {tool} on this machine')
  command = arguments(where, 'x', ["--gin.MODEL_DIR='gs://x'"], launcher)
  command.insert(2, '--dry_run')
  done = subprocess.run(command, capture_output=True, text=True)
  if done.returncode:
    raise UserError(done.stderr.strip().removeprefix('error: '))
