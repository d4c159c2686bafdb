"""Starts commands of the package without importing TensorFlow each time.

`python -m command_server DESCRIPTOR` imports once what takes seconds to import,
and forks a process for each request that arrives at the socket DESCRIPTOR. The
process runs a command as `python -m` does: it imports the package's modules
itself, the interpreter ends as usual, and signals reach the command directly.
At the time of the fork Python has one thread, and JAX no backend.

A request is a line of JSON and three descriptors: of the command's output, of
its errors, and of a pipe that receives the id of the command's process at once,
and its status when it has ended.
"""

import contextlib
import gc
import importlib
import json
import os
import runpy
import socket
import sys
import warnings

_IMPORTED = (
  *('tensorflow', 'tensorflow_datasets', 'seqio', 't5.data'),
  *('jax', 'flax.linen', 'optax', 'orbax.checkpoint', 'tensorboard.util'),
)
_PIECE = 2**16  # Bytes.


def main(requests):
  for name in _IMPORTED:
    importlib.import_module(name)
  # Otherwise each command's garbage collection copies all of this memory.
  gc.freeze()
  while True:
    message, files, *_ = socket.recv_fds(requests, _PIECE, 3)
    if not message:  # The tests have ended.
      return _reap()
    while not message.endswith(b'\n'):
      message += requests.recv(_PIECE)
    if _fork() == 0:
      requests.close()
      return _run_and_wait(json.loads(message), *files)
    for file in files:
      os.close(file)
    _reap()


def _reap():
  """Removes processes that ended; `time pytest` counts what they took."""
  with contextlib.suppress(ChildProcessError):
    while os.waitpid(-1, os.WNOHANG)[0]:
      pass


def _fork():
  # TensorFlow's allocator has threads, of which Python warns; it can fork.
  with warnings.catch_warnings(action='ignore', category=DeprecationWarning):
    return os.fork()


def _run_and_wait(request, output, errors, told):
  """Runs a command in another process and tells how it ended."""
  command = _fork()
  if command == 0:
    os.close(told)
    return _run(request, output, errors)
  os.close(output)
  os.close(errors)
  os.write(told, f'{command}\n'.encode())
  _, status = os.waitpid(command, 0)
  os.write(told, f'{status}\n'.encode())
  os._exit(0)


def _run(request, output, errors):
  for file, stream in (output, sys.stdout), (errors, sys.stderr):
    os.dup2(file, stream.fileno())
    os.close(file)
  os.environ.clear()
  os.environ.update(request['environment'])
  os.chdir(request['folder'])
  sys.path[0] = os.getcwd()
  sys.argv[1:] = request['arguments']
  runpy.run_module(request['module'], run_name='__main__', alter_sys=True)


if __name__ == '__main__':
  main(socket.socket(fileno=int(sys.argv[1])))
