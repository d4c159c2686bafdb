"""Gin configuration of the command-line binaries, in T5X's manner.

    python -m dst_t5x.train --gin_file=gin/models/t5_1_1_small.gin … \
      --gin.EPSILON=1e-4 --gin.MODEL_DIR=/tmp/run

`gin/…` files are found in the package wherever the command is run. Everything
is checked before the binary is called: see `parse`.
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
  """Replaces gin's configuration by the one that the arguments describe.

  Args:
    argv: `--gin_file=…` and `--gin.NAME=VALUE`, without the program's name.
    binary: a module's function; gin supplies its parameters.

  Returns:
    The binary with gin's configuration, to be called without arguments.

  Raises:
    UserError: a name is unknown, a value makes no sense, a flag or a binding
      in a file of the user's has no effect, a required value is missing, or
      files are in an order that loses something.
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
  """Runs a binary with the command line's configuration; then may exit.

  Args:
    binary: as given to `parse`.
    to_flags: makes what `parse` takes of a command line that has more.
    joined: `processes.joined` for what several processes do together.
  """
  command(lambda argv: parse(to_flags(argv), binary)(), joined)


def command(
  call: Callable[[Sequence[str]], Any],
  joined: Callable[[], contextlib.AbstractContextManager[None]] = (
    contextlib.nullcontext
  ),
) -> None:
  """Calls a function with the command line's arguments; then may exit.

  Args:
    call: does the work.
    joined: `processes.joined` for what several processes do together.

  How it ends: see `perform`.
  """
  argv = sys.argv[1:]
  if '--help' in argv or '-h' in argv:
    print(usage())
  else:
    perform(lambda: call(argv), joined)


def perform(
  work: Callable[[], Any],
  joined: Callable[[], contextlib.AbstractContextManager[None]] = (
    contextlib.nullcontext
  ),
) -> None:
  """Does a binary's work; then may exit.

  Args:
    work: all of it.
    joined: see `command`.

  A user's mistake ends in one line and exit status 1, an interrupt in one line
  and status 130, SIGTERM while training in one line and status 143; all other
  exceptions keep their traceback.
  """
  log_quietly()
  interrupts.listen()
  status: str | int = 0
  try:
    with joined():
      work()
      sys.stdout.flush()
  # Gin appends lines to what is raised inside of a configurable.
  except UserError as error:
    status = f'error: {first_line(error)}'
  except preemption.Stopped as stopped:
    print(first_line(stopped), file=sys.stderr)
    status = preemption.STATUS
  except BrokenPipeError:
    status = closed_pipe.leave()
  except (Exception, KeyboardInterrupt) as error:
    if not interrupts.led_to(error):
      raise
    print('interrupted', file=sys.stderr)
    status = interrupts.STATUS
    interrupts.end()
  if status:
    # By now the exception's frames are gone, and with them what TensorFlow may
    # hang on if it outlives the interpreter.
    gc.collect()
    if isinstance(status, str):
      print(status, file=sys.stderr)
    processes.leave(status if isinstance(status, int) else 1)


def bindings(binary: Callable[..., Any]) -> dict[str, str]:
  """Returns all that the binary's configuration sets, to compare two runs by.

  Args:
    binary: as given to `parse`.

  Returns:
    Sorted `scope/module.Class.parameter` -> value, macros replaced by their
    values; what the binary cannot reach is left out.
  """
  return check.flat_bindings(gin_names.reference_to(binary))


def operative_config() -> str:
  """The configuration used so far, defaults included, as a gin file."""
  return gin.operative_config_str()


def usage() -> str:
  """Returns the text of the command's `--help`."""
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
  """Raises UserError if a model's file overrides a task's or a method's."""
  for i, name in enumerate(files):
    if 'gin/tasks/' in name or 'gin/methods/' in name:
      for later in files[i + 1 :]:
        if 'gin/models/' in later:
          raise UserError(
            f'name {later} before {name}, which has another decoder or dropout'
          )


def log_quietly() -> None:
  """Logs to stderr: our own messages, and most errors of all others."""
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
  python_logging.captureWarnings(True)  # They are not ours.
  logging.set_verbosity(logging.INFO)


def _will_raise(record: python_logging.LogRecord) -> bool:
  """Whether an error comes from a thread whose exception will reach us."""
  return bool(
    {'asyncio', 'clu', 'gcsfs', 'orbax'} & set(record.pathname.split(os.sep))
  )
