"""Command lines that name a task instead of a gin file: `show_task gsm8k`."""

from collections.abc import Sequence
import pathlib

from dst_t5x.config import gin_files
from dst_t5x.core.errors import UserError, nearest


def to_flags(arguments: Sequence[str], run_file: str) -> list[str]:
  """Returns the gin flags of a command line.

  Args:
    arguments: flags of `binaries.parse`, and possibly the name of a task. The
      name stands for the file of that name in `gin/tasks`. Otherwise it stands
      for a task of the file with the longest name that the task's name begins
      with: `super_glue_rte` is a task of `gin/tasks/super_glue.gin`.
    run_file: the command's gin file.

  Raises:
    UserError: there is no such task, or there are several names.
  """
  files, others = split(arguments)
  return [f'--gin_file={run_file}', *files, *others]


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
  """Returns the gin files of a command line with the task's, and other flags.

  Arguments and errors as in `to_flags`.
  """
  names = [name for name in arguments if not name.startswith('-')]
  flags = [flag for flag in arguments if flag.startswith('-')]
  if len(names) > 1:
    raise UserError(f'one task at a time, not {" and ".join(names)}')
  files = [flag for flag in flags if flag.startswith('--gin_file')]
  if not names and not files:
    raise UserError(f'name a task: {", ".join(_files())}; or give a --gin_file')
  others = [flag for flag in flags if flag not in files]
  of_task = _flags_of(*names)
  # A model's file comes before the task's, which overrides some of it.
  return [*files, *of_task[:1]], [*of_task[1:], *others]


def _flags_of(name: str | None = None) -> list[str]:
  """Returns the flags that choose a task."""
  if name is None:
    return []
  files = _files()
  begins = [stem for stem in files if name.startswith(stem)]
  if not begins:
    raise UserError(
      f'there is no task {name!r}{nearest(name, files)} (known:'
      f' {", ".join(files)}; give others by --gin_file)'
    )
  stem = max(begins, key=len)
  choice = [] if stem == name else [f'--gin.MIXTURE_OR_TASK_NAME={name!r}']
  return [f'--gin_file={files[stem]}', *choice]


def _files() -> dict[str, str]:
  """Returns name -> gin file of a task, names without folder and ending."""
  shipped = (pathlib.PurePosixPath(name) for name in gin_files.shipped())
  return {path.stem: str(path) for path in shipped if path.parts[1] == 'tasks'}
