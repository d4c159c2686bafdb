"""Gin configuration of the commands, in T5X's manner.

    python -m dst_t5x.train --gin_file=gin/models/t5_1_1_small.gin … \
      --gin.EPSILON=1e-4 --gin.MODEL_DIR=/tmp/run

`gin/…` files are found in the package, whatever the working directory is. The
configuration is checked before the command starts; see `parse`.
"""

from collections.abc import Callable, Sequence
import contextlib
import gc
import inspect
import logging as python_logging
import os
import pathlib
import sys
from typing import Any

from absl import logging
import gin

from dst_t5x.config import check
from dst_t5x.config import gin_files
from dst_t5x.config import gin_names
from dst_t5x.core import closed_pipe
from dst_t5x.core.errors import UserError, first_line, nearest
from dst_t5x.runtime import interrupts
from dst_t5x.runtime import preemption
from dst_t5x.runtime import processes

_PACKAGE = str(pathlib.Path(__file__).parent.parent) + os.sep
_USAGE = """
usage: python -m {module} --gin_file=FILE ... --gin.NAME=VALUE ...

  --gin_file=FILE    a gin file: one of your own, or one of those below; later
                     files override earlier ones
  --gin.NAME=VALUE   sets a macro; overrides all files
  --gin.SCOPE/MODULE.CLASS.PARAMETER=VALUE
                     sets a parameter; the scope and the module may be left out
  --help             shows this

gin files of the package, and the macros that they define:"""


def parse(argv: Sequence[str], binary: Callable[..., Any]) -> Callable[[], Any]:
  """Replaces gin's configuration by that of the arguments.

  Args:
    argv: `--gin_file=…` and `--gin.NAME=VALUE`, without the program's name.
    binary: a module's function; gin supplies its arguments.

  Returns:
    The binary with gin's configuration, which takes no arguments.

  Raises:
    UserError: a name is unknown, a value is invalid, a flag or a binding in a
      user's file has no effect, a required value is missing, or the order of
      the files would lose a setting.
  """
  files, flags = _split(argv)
  _check_order(files)
  gin.clear_config()
  reference = gin_names.reference_to(binary)
  origins: gin_files.Origins = {}
  for name in files:
    gin_files.read_file(name, origins)
  gin_files.read_flags(flags, origins, reference)
  check.check(reference, origins)
  return reference.scoped_configurable_fn


def run(
  binary: Callable[..., Any],
  to_flags: Callable[[Sequence[str]], Sequence[str]] = list,
  joined: Callable[[], contextlib.AbstractContextManager[None]] = (
    contextlib.nullcontext
  ),
) -> None:
  """Runs a binary with the configuration of the command line; may exit.

  Args:
    binary: as in `parse`.
    to_flags: command-line arguments -> arguments of `parse`.
    joined: `processes.joined` if several processes run the binary together.
  """
  command(lambda argv: parse(to_flags(argv), binary)(), joined)


def command(
  call: Callable[[Sequence[str]], Any],
  joined: Callable[[], contextlib.AbstractContextManager[None]] = (
    contextlib.nullcontext
  ),
) -> None:
  """Calls a function with the command line's arguments; may exit.

  Args:
    call: does the work.
    joined: `processes.joined` if several processes do the work together.

  For the exit status see `perform`.
  """
  argv = sys.argv[1:]
  if '--help' in argv or '-h' in argv:
    perform(lambda: print(usage()))
  else:
    perform(lambda: call(argv), joined)


def perform(
  work: Callable[[], Any],
  joined: Callable[[], contextlib.AbstractContextManager[None]] = (
    contextlib.nullcontext
  ),
) -> None:
  """Does the work of a command; may exit.

  Args:
    work: does all of the work.
    joined: see `command`.

  A UserError prints one line and ends with status 1, an interrupt with status
  130, and SIGTERM during training with status 143. Other exceptions keep their
  traceback.
  """
  log_quietly()
  interrupts.listen()
  status: str | int = 0
  try:
    with joined():
      work()
      sys.stdout.flush()
  # Gin appends lines to the message of an exception in a configurable.
  except UserError as error:
    status = f'error: {first_line(error)}'
  except preemption.Stopped as stopped:
    print(first_line(stopped), file=sys.stderr)
    status = preemption.STATUS
  except BrokenPipeError:
    status = closed_pipe.discard_output()
  except (Exception, KeyboardInterrupt) as error:
    if not interrupts.caused(error):
      raise
    print('interrupted', file=sys.stderr)
    status = interrupts.STATUS
    interrupts.set_exit_status()
  if status:
    # TensorFlow may hang at exit if objects in the exception's frames outlive
    # the interpreter. The frames are free here.
    gc.collect()
    if isinstance(status, str):
      print(status, file=sys.stderr)
    processes.end_process(status if isinstance(status, int) else 1)


def bindings(binary: Callable[..., Any]) -> dict[str, str]:
  """Returns the settings that the binary uses, for comparing two runs.

  Args:
    binary: as in `parse`.

  Returns:
    Sorted `scope/module.Class.parameter` -> value, with macros replaced by
    their values. Settings that the binary cannot reach are left out.
  """
  return check.flat_bindings(gin_names.reference_to(binary))


def operative_config() -> str:
  """Returns the configuration used so far, with defaults, as a gin file."""
  return gin.operative_config_str()


def usage() -> str:
  """Returns the text of `--help`."""
  main = sys.modules['__main__']
  name = main.__spec__.name if main.__spec__ else main.__file__
  lines = [inspect.getdoc(main) or '', _USAGE.format(module=name)]
  for name in gin_files.shipped():
    lines += ['', f'  {name}']
    lines += [f'      {macro}' for macro in gin_files.macro_lines(name)]
  return '\n'.join(lines)


def _split(argv: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
  """Splits the arguments into gin files and (name, value) pairs."""
  files, flags = [], []
  for argument in argv:
    flag, equals, value = argument.partition('=')
    if flag == '--gin_file' and value:
      files.append(value)
    elif flag == '--gin_file' or (flag.startswith('--gin.') and not equals):
      raise UserError(f'{argument} needs a value: {flag}=…')
    elif flag.startswith('--gin.'):
      flags.append((flag.removeprefix('--gin.'), value))
    else:
      hint = nearest(flag, ['--gin_file', '--gin.NAME', '--help'])
      raise UserError(f'unknown argument {argument!r}{hint}')
  return files, flags


def _check_order(files: Sequence[str]) -> None:
  """Raises UserError if a model's file would override a task's or method's."""
  for i, name in enumerate(files):
    if 'gin/tasks/' in name or 'gin/methods/' in name:
      for later in files[i + 1 :]:
        if 'gin/models/' in later:
          raise UserError(
            f'name {later} before {name}, which has another decoder or dropout'
          )


def log_quietly() -> None:
  """Logs our own messages, and most errors of libraries, to stderr."""
  handler = python_logging.StreamHandler()
  handler.addFilter(
    lambda record: (
      record.pathname.startswith(_PACKAGE)
      or (record.levelno >= python_logging.ERROR and not _will_raise(record))
    )
  )
  python_logging.basicConfig(
    level=python_logging.INFO,
    format='%(asctime)s %(levelname)s %(message)s',
    datefmt='%H:%M:%S',
    handlers=[handler],
    force=True,
  )
  python_logging.captureWarnings(True)  # Warnings come from libraries.
  logging.set_verbosity(logging.INFO)


def _will_raise(record: python_logging.LogRecord) -> bool:
  """Returns whether a thread logs an exception that will also be raised."""
  return bool(
    {'asyncio', 'gcsfs', 'orbax'} & set(record.pathname.split(os.sep))
  )
