"""Commands as processes that `command_server` forks."""

import atexit
import concurrent.futures
import functools
import json
import os
import pathlib
import select
import signal
import socket
import subprocess
import sys

_TESTS = pathlib.Path(__file__).resolve().parent
# What Python and the libraries read as they start or are imported.
# DST_DATA_DIR stands for such variables: see `core/data_folders`.
_READ_ONCE = (
  *('PYTHON', 'LANG', 'LC_', 'JAX_', 'XLA_', 'TF'),
  *('DST_DATA_DIR', 'SACREBLEU'),
)


def environment(**changes):
  """Returns the variables of a command's process."""
  variables = os.environ | {'JAX_PLATFORMS': 'cpu'} | changes
  paths = [_TESTS.parent, _TESTS, variables.get('PYTHONPATH', '')]
  variables['PYTHONPATH'] = os.pathsep.join(filter(None, map(str, paths)))
  return variables


def can_run_with(variables):
  """Whether a forked process would read this environment as a new one does."""
  return _read_once(variables) == _read_once(_environment_of_server())


def _read_once(variables):
  return {
    name: value
    for name, value in variables.items()
    # TensorFlow sets this one as it is imported, in the server too.
    if name.startswith(_READ_ONCE) and name != 'TF2_BEHAVIOR'
  }


class Process:
  """A command's process; behaves as subprocess.Popen with text in pipes."""

  def __init__(self, module, arguments, variables):
    """Starts `python -m MODULE`.

    Args:
      module: of the package.
      arguments: texts.
      variables: its environment; see `can_run_with`.
    """
    request = {
      'module': module,
      'arguments': arguments,
      'environment': variables,
      'folder': os.getcwd(),
    }
    pipes = [os.pipe() for _ in range(3)]
    ours, theirs = zip(*pipes, strict=True)
    message = json.dumps(request).encode() + b'\n'
    sent = socket.send_fds(_server(), [message], theirs)
    _server().sendall(message[sent:])
    for file in theirs:
      os.close(file)
    self.stdout, self.stderr = (os.fdopen(file) for file in ours[:2])
    self._told = os.fdopen(ours[2], 'rb', buffering=0)
    self.pid = int(self._told.readline())
    self.returncode = None
    self._read = None

  def poll(self):
    return self._wait(0)

  def wait(self, timeout=None):
    if self._wait(timeout) is None:
      raise subprocess.TimeoutExpired(f'process {self.pid}', timeout)
    return self.returncode

  def _wait(self, timeout):
    if self.returncode is None and any(
      select.select([self._told], [], [], timeout)
    ):
      with self._told as told:
        self.returncode = os.waitstatus_to_exitcode(int(told.readline()))
    return self.returncode

  def communicate(self, timeout=None):
    if self._read is None:
      readers = concurrent.futures.ThreadPoolExecutor(2)
      streams = self.stdout, self.stderr
      self._read = [readers.submit(_read, stream) for stream in streams]
      readers.shutdown(wait=False)
    self.wait(timeout)
    return tuple(read.result() for read in self._read)

  def send_signal(self, number):
    if self.poll() is None:
      os.kill(self.pid, number)

  def terminate(self):
    self.send_signal(signal.SIGTERM)

  def kill(self):
    self.send_signal(signal.SIGKILL)


def _read(stream):
  with stream:
    return stream.read()


@functools.cache
def _environment_of_server():
  return environment()


@functools.cache
def _server():
  """Starts the server; returns the socket that takes requests."""
  ours, theirs = socket.socketpair()
  with theirs:
    process = subprocess.Popen(
      [sys.executable, '-m', 'command_server', str(theirs.fileno())],
      env=_environment_of_server(),
      pass_fds=[theirs.fileno()],
      stdin=subprocess.DEVNULL,
      stdout=subprocess.DEVNULL,
    )
  atexit.register(_stop, process, ours)
  return ours


def _stop(process, requests):
  requests.close()
  process.wait()
