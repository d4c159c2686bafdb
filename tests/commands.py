"""Runs the binaries on the toy task, as a user would: in processes."""

import dataclasses
import os
import pathlib
import subprocess
import sys

TESTS = pathlib.Path(__file__).resolve().parent
TOY = f'--gin_file={TESTS / "toy.gin"}'
TIMEOUT = 240  # Seconds; some twenty times what an idle machine takes.


@dataclasses.dataclass(frozen=True)
class Commands:
  """Starts processes that share one cache of compiled programs.

  Attributes:
    cache: the folder of the cache; None compiles everything anew.
  """

  cache: pathlib.Path | None = None

  def start(self, module, *arguments, environment=None, **options):
    """Starts `python -m dst_t5x.<module>`."""
    paths = [str(TESTS.parent), str(TESTS), os.environ.get('PYTHONPATH', '')]
    variables = os.environ | {
      'PYTHONPATH': os.pathsep.join(filter(None, paths)),
      'JAX_PLATFORMS': 'cpu',
    }
    if self.cache is not None:
      variables |= {
        'JAX_COMPILATION_CACHE_DIR': str(self.cache),
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
        'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1',
      }
    return subprocess.Popen(
      [sys.executable, '-m', f'dst_t5x.{module}', *map(str, arguments)],
      env=variables | (environment or {}),
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      **options,
    )

  def finish(self, process):
    """Waits for a process; returns exit status, output and errors."""
    try:
      out, err = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired as e:
      process.kill()
      out, err = process.communicate()
      raise AssertionError(f'still running after {TIMEOUT} s: {err}') from e
    return process.returncode, out, err

  def run(self, module, *arguments, environment=None, **options):
    """Runs a binary that must succeed; returns its output."""
    status, out, err = self.finish(
      self.start(module, *arguments, environment=environment, **options)
    )
    assert status == 0, err
    return out


def flags(**bindings):
  """Returns `--gin.NAME=VALUE` for each keyword."""
  texts = {
    name: str(value) if isinstance(value, pathlib.Path) else value
    for name, value in bindings.items()
  }
  return [f'--gin.{name}={value!r}' for name, value in texts.items()]
