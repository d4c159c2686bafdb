"""Stands in for gcloud: a slice of two hosts, which are folders.

What is sent to a host is carried out by bash in its folder. The environment
variable FAKE names a folder: `calls` has a line a call, `state` the slice's
state, `training` is the shell code that training stands for.
"""

import os
import pathlib
import subprocess
import sys

_ROOT = pathlib.Path(os.environ['FAKE'])
_HOSTS = ('host0', 'host1')
# python3 on a host: `-m uv venv …` makes what training is started with.
_PYTHON3 = """#!/bin/bash
if [[ $3 == venv ]]; then
  mkdir -p .venv/bin
  printf '#!/bin/bash\\nprintf "%%s\\\\n" "$@" > args; . "$FAKE/training"\\n' \\
    > .venv/bin/python
  chmod +x .venv/bin/python
fi
"""
_NEXT = {'WAITING_FOR_RESOURCES': 'PROVISIONING', 'PROVISIONING': 'ACTIVE'}


def _option(arguments: list[str], name: str) -> str:
  prefix = f'--{name}='
  return next(
    argument.removeprefix(prefix)
    for argument in arguments
    if argument.startswith(prefix)
  )


def _on_host(host: str, command: str) -> int:
  home = _ROOT / host
  tools = home / 'bin'
  tools.mkdir(parents=True, exist_ok=True)
  (tools / 'python3').write_text(_PYTHON3)
  (tools / 'python3').chmod(0o700)
  path = f'{tools}{os.pathsep}{os.environ["PATH"]}'
  return subprocess.call(
    ['bash', '-c', command],
    cwd=home,
    env=os.environ | {'HOME': str(home), 'PATH': path},
  )


def main(arguments: list[str]) -> int:
  """Carries out a call; returns the exit status."""
  with (_ROOT / 'calls').open('a') as calls:
    shown = (a.partition('\n')[0] for a in arguments)
    calls.write(' '.join(shown) + '\n')
  state = _ROOT / 'state'
  verb = arguments[3]
  if verb == 'create':
    state.write_text('WAITING_FOR_RESOURCES')
    return 0
  if not state.exists():
    return 1
  now = state.read_text()
  if verb == 'describe':
    print(now)
    state.write_text(_NEXT.get(now, now))
    return 0
  if verb == 'delete':
    state.unlink()
    for host in _HOSTS:
      subprocess.run(['rm', '-rf', _ROOT / host], check=True)
    return 0
  if now != 'ACTIVE':
    return 255
  worker = _option(arguments, 'worker')
  hosts = _HOSTS if worker == 'all' else [f'host{worker}']
  if verb == 'scp':
    target = arguments[5].partition(':')[2]
    for host in hosts:
      (_ROOT / host).mkdir(exist_ok=True)
      subprocess.run(['cp', arguments[4], _ROOT / host / target], check=True)
    return 0
  command = _option(arguments, 'command')
  return max(_on_host(host, command) for host in hosts)


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
