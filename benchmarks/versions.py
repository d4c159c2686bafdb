"""The same small run on several versions of JAX: what is equal in its bits.

    python benchmarks/versions.py .stacks/*/bin/python

Each interpreter draws a seed, makes ten steps of DST and of full fine-tuning,
and writes a subset file and checkpoints; each reads what the others wrote. A
run of DST then moves from the first to the last and back. The exit status is 1
if anything is read differently from how it was written.
"""

import argparse
import hashlib
import itertools
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import numpy as np

from dst_t5x.core import json_text

_ROOT = pathlib.Path(__file__).resolve().parent.parent
_STEPS = 10
_METHODS = ('dst', 'full')
PyTree = Any


def _digest(tree: PyTree) -> str:
  """Returns a hash over the bits of all tensors, in the order of a tree."""
  import jax

  sha = hashlib.sha256()
  for leaf in jax.tree.leaves(tree):
    sha.update(np.asarray(leaf).tobytes())
  return sha.hexdigest()


def _trainer(name: str) -> Any:
  from dst_t5x.engine import optimizers
  from dst_t5x.engine import trainer
  from dst_t5x.method import projection
  from dst_t5x.models.t5 import network

  config = network.T5Config(
    vocab_size=512,
    emb_dim=64,
    num_heads=4,
    num_encoder_layers=2,
    num_decoder_layers=2,
    head_dim=16,
    mlp_dim=128,
    mlp_activations=('gelu', 'linear'),
  )
  method = projection.SubsetProjection(epsilon=0.01)
  return trainer.Trainer(
    network.Transformer(config),
    optimizers.adafactor(optimizers.schedule(0.01)),
    method if name == 'dst' else projection.NoProjection(),
  )


def _seed(network: Any) -> PyTree:
  """Returns parameters as the model draws them."""
  import jax
  import jax.numpy as jnp

  tokens = jnp.ones((1, 4), jnp.int32)
  drawn = network.init(
    jax.random.key(0), tokens, tokens, tokens, enable_dropout=False
  )
  return drawn['params']


def _batch(step: int) -> dict[str, np.ndarray]:
  random = np.random.default_rng(step)
  inputs, targets = random.integers(2, 512, (2, 8, 16), dtype=np.int32)
  return {
    'encoder_input_tokens': inputs,
    'decoder_input_tokens': np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
    'decoder_target_tokens': targets,
    'decoder_loss_weights': np.ones(targets.shape, np.float32),
  }


def _rest(state: Any) -> dict[str, PyTree]:
  return {'optimizer': state.opt_state, 'projection': state.projection_state}


def _train(folder: pathlib.Path, name: str, last: int) -> None:
  """Makes steps until `last`, from the folder's latest checkpoint or 0."""
  import jax

  from dst_t5x import subsets
  from dst_t5x.checkpoints import run_folder
  from dst_t5x.checkpoints import state_keys
  from dst_t5x.engine import trainer as trainer_lib
  from dst_t5x.subsets import fingerprint

  trainer = _trainer(name)
  seed = _seed(trainer.network)
  state = trainer.init(jax.tree.map(jax.numpy.copy, seed))
  files = run_folder.RunFolder(folder)
  first = files.latest_step or 0
  if first:
    saved = files.parameters(first)
    params = saved.get('dense')
    if params is None:
      host = jax.device_get(seed)
      params = subsets.apply(subsets.from_arrays(saved), host)
    flat = files.state(first, state_keys.flatten(_rest(state), seed))
    rest = state_keys.unflatten(_rest(state), seed, flat)
    state = state._replace(
      step=jax.numpy.int32(first),
      params=jax.tree.map(jax.numpy.asarray, params),
      opt_state=rest['optimizer'],
      projection_state=rest['projection'],
    )
  constants = trainer_lib.Constants(seed=seed if name == 'dst' else ())
  step = jax.jit(trainer.train_step)
  for i in range(first, last):
    state, _ = step(state, constants, _batch(i), jax.random.key(1), False)
  parameters = {'dense': jax.device_get(state.params)}
  if name == 'dst':
    host = jax.device_get(seed)
    identity = fingerprint.fingerprint(host)
    subset = subsets.extract(jax.device_get(state.params), host, identity)
    subsets.save(folder / 'last.dst', subset, {'step': last})
    parameters = subsets.to_arrays(subset)
  flat = state_keys.flatten(_rest(state), state.params)
  files.save(last, parameters, flat, b'no data', {'step': last})
  files.close()


def _facts() -> dict[str, str]:
  """Returns the versions, and hashes of what no training has touched."""
  import flax
  import jax

  from dst_t5x.subsets import fingerprint

  seed = jax.device_get(_seed(_trainer('full').network))
  return {
    'versions': f'Python {sys.version.split()[0]}, jax {jax.__version__}, '
    f'flax {flax.__version__}',
    'seed': _digest(seed),
    'fingerprint': fingerprint.fingerprint(seed),
    'random bits': _digest(jax.random.bits(jax.random.key(7), (1000,))),
  }


def _abstract_rest(name: str) -> dict[str, Any]:
  """Returns key -> shape, on the first device, of what a checkpoint has."""
  import jax

  from dst_t5x.checkpoints import state_keys

  trainer = _trainer(name)
  seed = _seed(trainer.network)
  shapes = jax.eval_shape(
    lambda: state_keys.flatten(_rest(trainer.init(seed)), seed)
  )
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), shapes
  )


def _read(folder: pathlib.Path) -> dict[str, str]:
  """Returns hashes of what is read from the files of a small run."""
  from dst_t5x import subsets
  from dst_t5x.checkpoints import run_folder

  subset, _ = subsets.load(folder / 'dst' / 'last.dst')
  read = {'.dst': _digest(subsets.to_arrays(subset))}
  for name in _METHODS:
    files = run_folder.RunFolder(folder / name, read_only=True)
    step = files.latest_step
    assert step is not None
    read[f'{name} parameters'] = _digest(files.parameters(step))
    like = _abstract_rest(name)
    read[f'{name} optimizer'] = _digest(files.state(step, like))
    files.close()
  return read


def _call(python: str, *arguments: str) -> Any:
  """Returns the JSON that this program prints in another interpreter."""
  environment = os.environ | {'PYTHONPATH': str(_ROOT), 'JAX_PLATFORMS': 'cpu'}
  command = [python, __file__, *arguments]
  done = subprocess.run(
    command, env=environment, stdout=subprocess.PIPE, text=True
  )
  if done.returncode:
    sys.exit(f'error: {" ".join(command)} ended with {done.returncode}')
  return json_text.loads(done.stdout.splitlines()[-1])


def _differences(one: pathlib.Path, two: pathlib.Path) -> None:
  """Prints how far the results of two small runs are from each other."""
  from dst_t5x import subsets
  from dst_t5x.checkpoints import run_folder

  left, right = (
    subsets.load(folder / 'dst' / 'last.dst')[0] for folder in (one, two)
  )
  same, by, all_of_left = 0, 0.0, 0
  for path, positions in left.positions.items():
    others = right.positions.get(path, np.zeros(0, np.int64))
    _, x, y = np.intersect1d(positions, others, return_indices=True)
    same, all_of_left = same + len(x), all_of_left + len(positions)
    if len(x):
      by = max(by, _largest(left.values[path][x], right.values[path][y]))
  print(f'  dst, positions: {same} of {all_of_left} are equal')
  print(f'  dst, values: differ by up to {by:.2g}')
  left, right = (
    run_folder.RunFolder(folder / 'full', read_only=True).parameters(_STEPS)
    for folder in (one, two)
  )
  import jax

  by = max(jax.tree.leaves(jax.tree.map(_largest, left, right)))
  print(f'  full, parameters: differ by up to {by:.2g}')


def _largest(x: np.ndarray, y: np.ndarray) -> float:
  return float(np.max(np.abs(x.astype(np.float64) - y), initial=0))


def compare(pythons: list[str], folder: pathlib.Path) -> bool:
  """Prints the comparison; returns whether all files were read alike."""
  whole = True
  # Later processes need not compile again; the cache is by version.
  os.environ['JAX_COMPILATION_CACHE_DIR'] = str(folder / 'compiled')
  folders = [folder / str(i) for i in range(len(pythons))]
  facts = [
    _call(python, '--train', str(_STEPS), '--folder', str(place))
    for python, place in zip(pythons, folders, strict=True)
  ]
  for python, place in itertools.product(pythons, folders):
    read = _call(python, '--read', '--folder', str(place))
    written = facts[folders.index(place)]['read']
    alike = read == written
    whole = whole and alike
    writer = facts[folders.index(place)]['versions']
    print(f'{python} reads {writer}: {"as written" if alike else "DIFFERENT"}')
  for fact, place in zip(facts[1:], folders[1:], strict=True):
    print(f'{facts[0]["versions"]} and {fact["versions"]}:')
    for name in ('seed', 'fingerprint', 'random bits'):
      same = fact[name] == facts[0][name]
      print(f'  {name}: {"equal" if same else "different"}')
    _differences(folders[0], place)
  for last, python in zip((4, 7, 10), (0, -1, 0), strict=True):
    moved = _call(
      pythons[python], '--train', str(last), '--folder', str(folder / 'moved')
    )
  print(f'a run moved to and fro: {moved["dst steps"]} steps')
  return whole and moved['dst steps'] == _STEPS


def _work(options: argparse.Namespace) -> dict[str, Any]:
  """Does what another interpreter asked for; returns what it reports."""
  from dst_t5x.checkpoints import run_folder

  if options.read:
    return _read(options.folder)
  for name in _METHODS:
    _train(options.folder / name, name, options.train)
  files = run_folder.RunFolder(options.folder / 'dst', read_only=True)
  read = {'read': _read(options.folder), 'dst steps': files.latest_step}
  return _facts() | read


def main() -> None:
  """Runs the comparison, or one interpreter's part of it."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('pythons', nargs='*', help='interpreters, at least two')
  parser.add_argument('--folder', type=pathlib.Path, help=argparse.SUPPRESS)
  parser.add_argument('--read', action='store_true', help=argparse.SUPPRESS)
  parser.add_argument('--train', type=int, help=argparse.SUPPRESS)
  options = parser.parse_args()
  if options.folder is not None:
    print(json_text.dumps(_work(options)))
    return
  if len(options.pythons) < 2:
    parser.error('name two interpreters or more')
  with tempfile.TemporaryDirectory() as folder:
    whole = compare(options.pythons, pathlib.Path(folder))
  sys.exit(not whole)


if __name__ == '__main__':
  main()
