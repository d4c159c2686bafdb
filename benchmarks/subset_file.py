"""How large subset files are, and how fast they are saved, loaded, applied.

  python benchmarks/subset_file.py --json subset_file.json

Random parameters in the shapes of T5 1.1 Small and Base, of which a share ε is
changed at random places, in each module and layer alike. All times are medians
over --repeats, with files in the page cache.

Beside them: `flat`, the same entries with int32 positions in safetensors, a
path and two arrays a tensor; 12 bytes an entry, the row, column and value of
Hugging Face's SHiRA; LoRA's matrices at some ranks on all attention matrices;
and the dense model: `dense_load_s`, a Hugging Face folder to the device as this
package reads it; `dense_read_s`, the least that it could take, a safetensors
file with nothing to transpose; `dense_copy_s`, from the device to the device.

apply_s and revert_s are in place, on the device; place_s is the way there from
the loaded file. `share_of_dense_load` and `share_of_dense_read` are load, place
and apply of the subset over those of the dense model.
"""

import argparse
from collections import defaultdict
from collections.abc import Iterator
import functools
import pathlib
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import numpy as safetensors_numpy
import tables
import works

from dst_t5x import subsets
from dst_t5x.checkpoints import hf_checkpoint
from dst_t5x.models import families
from dst_t5x.models.t5 import network

PyTree = Any

_MODELS = ('small', 'base')
_RANKS = (1, 8)
_FINGERPRINT = '0' * 64  # Hashing is no part of what is measured.


def random_seed(
  config: network.T5Config, random: np.random.Generator
) -> PyTree:
  """Returns random parameters of a network, on the host."""
  tokens = jnp.ones((1, 2), jnp.int32)
  model = network.Transformer(config)
  shapes = jax.eval_shape(
    lambda: model.init(
      jax.random.key(0), tokens, tokens, tokens, enable_dropout=False
    )
  )['params']
  return jax.tree.map(
    lambda leaf: 0.05 * random.standard_normal(leaf.shape, np.float32), shapes
  )


def random_subset(
  seed: PyTree, epsilon: float, random: np.random.Generator
) -> subsets.Subset:
  """Returns a subset of a share ε of each tensor."""
  nothing = subsets.extract(seed, seed, _FINGERPRINT)
  positions, values = {}, {}
  for path, tensor in nothing.tensors.items():
    size = tensor.size
    count = round(epsilon * size + random.random() - 0.5)
    if count:
      chosen = random.choice(size, count, replace=False, shuffle=False)
      positions[path] = np.sort(chosen).astype(np.int64)
      values[path] = random.standard_normal(count, np.float32)
  return subsets.Subset(nothing.tensors, positions, values, _FINGERPRINT)


def flat_bytes(found: subsets.Subset) -> int:
  """Returns the size of a file of int32 positions and values a tensor."""
  arrays = {}
  for path, positions in found.positions.items():
    arrays[f'{path}.positions'] = positions.astype(np.int32)
    arrays[f'{path}.values'] = found.values[path]
  return len(safetensors_numpy.save(arrays))


def lora_bytes(found: subsets.Subset, rank: int) -> int:
  """Returns the size of LoRA's matrices on query, key, value and output."""
  arrays = {}
  for path, tensor in found.tensors.items():
    if 'attention/' in path and path.endswith('kernel'):
      rows, columns = tensor.shape
      arrays[f'{path}.lora_a'] = np.zeros((rows, rank), np.float32)
      arrays[f'{path}.lora_b'] = np.zeros((rank, columns), np.float32)
  return len(safetensors_numpy.save(arrays))


def sizes(
  found: subsets.Subset, seed: PyTree, epsilon: float, file: pathlib.Path
) -> Iterator[tuple[str, float, str]]:
  """Yields metric, value and unit of what is stored; writes the file."""
  about = {'epsilon': epsilon, 'silos': 'per_module_and_layer'}
  size = subsets.save(file, found, about)
  arrays = safetensors_numpy.load(file.read_bytes())
  codes = arrays['quotients'].nbytes + arrays['remainders'].nbytes
  entropy = -epsilon * np.log2(epsilon) - (1 - epsilon) * np.log2(1 - epsilon)
  predicted = subsets.predicted_bytes(seed, found.size, about)
  yield 'entries', found.size, ''
  yield 'file_bytes', size, 'bytes'
  yield 'file_bytes_predicted', predicted, 'bytes'
  yield 'index_bytes_per_entry', codes / found.size, 'bytes'
  yield 'index_entropy_per_entry', entropy / epsilon / 8, 'bytes'
  yield 'bytes_per_entry', size / found.size, 'bytes'
  yield 'flat_bytes_per_entry', flat_bytes(found) / found.size, 'bytes'
  yield 'shira_bytes_per_entry', 12, 'bytes'
  for rank in _RANKS:
    yield f'lora_{rank}_file_bytes', lora_bytes(found, rank), 'bytes'


def times_of_subset(
  found: subsets.Subset, params: PyTree, file: pathlib.Path, repeats: int
) -> tuple[dict[str, float], PyTree]:
  """Returns the times of a subset, and the parameters, which are donated."""
  times: dict[str, list[float]] = defaultdict(list)

  def timed(name: str, *call: Any) -> Any:
    seconds, result = tables.seconds(*call)
    times[name].append(seconds)
    return result

  layout = subsets.Layout(params, _FINGERPRINT)
  # Apart: writing to the disk goes on for a while.
  for _ in range(repeats + 1):
    timed('save_s', subsets.save, file, found, {})
  for _ in range(repeats + 1):
    loaded, _ = timed('load_s', subsets.load, file)
    placed = timed('place_s', layout.place, loaded, params)
    for name, tuned in (('apply_s', True), ('revert_s', False)):
      write = functools.partial(layout.write, tuned=tuned)
      params = timed(name, write, params, placed)
  # The first ones compile.
  return tables.medians({n: s[1:] for n, s in times.items()}), params


def times_of_dense(
  seed: PyTree, folder: pathlib.Path, repeats: int
) -> dict[str, float]:
  """Returns how long it takes to load the dense model, and to copy it."""
  hf_checkpoint.save(folder / 'hf', seed, families.network_of(seed))
  file = folder / 'dense.safetensors'
  leaves = jax.tree_util.tree_leaves_with_path(seed)
  safetensors_numpy.save_file(
    {jax.tree_util.keystr(path): leaf for path, leaf in leaves}, file
  )
  copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))

  def to_device(tree: PyTree) -> PyTree:
    # Not in the file's memory, which could not be changed in place.
    return jax.device_put(tree, may_alias=False)

  times: dict[str, list[float]] = defaultdict(list)
  for _ in range(repeats + 1):
    for name, function in (
      ('dense_load_s', lambda: hf_checkpoint.load(folder / 'hf').params),
      ('dense_read_s', lambda: safetensors_numpy.load_file(file)),
    ):
      seconds, params = tables.seconds(lambda f=function: to_device(f()))
      times[name].append(seconds)
    times['dense_copy_s'].append(tables.seconds(copy, params)[0])
  return tables.medians({n: s[1:] for n, s in times.items()})


def measure(
  model: str, options: argparse.Namespace, folder: pathlib.Path
) -> Iterator[tables.Row]:
  """Yields the rows of a model."""
  random = np.random.default_rng(0)
  config = works.network_of(f't5_1_1_{model}').config
  seed = random_seed(config, random)

  def row(epsilon: float | None, metric: str, value: float, unit: str) -> Any:
    return {
      'work': f't5_1_1_{model}',
      'epsilon': epsilon,
      'metric': metric,
      'value': value,
      'unit': unit,
      'device': jax.devices()[0].device_kind,
    }

  dense = times_of_dense(seed, folder, options.repeats)
  for metric, value in dense.items():
    yield row(None, metric, value, 's')
  params = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))(seed)
  for epsilon in options.epsilon:
    found = random_subset(seed, epsilon, random)
    file = folder / 'subset.dst'
    for metric, value, unit in sizes(found, seed, epsilon, file):
      yield row(epsilon, metric, value, unit)
    times, params = times_of_subset(found, params, file, options.repeats)
    for metric, value in times.items():
      yield row(epsilon, metric, value, 's')
    applied = times['load_s'] + times['place_s'] + times['apply_s']
    for way in ('load', 'read'):
      share = applied / dense[f'dense_{way}_s']
      yield row(epsilon, f'share_of_dense_{way}', share, '')


def main() -> None:
  """Measures, prints, writes."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--json', metavar='FILE', help='write the rows here')
  parser.add_argument('--models', nargs='+', default=_MODELS, choices=_MODELS)
  parser.add_argument(
    '--epsilon', nargs='+', type=float, default=[1e-4, 1e-3, 1e-2]
  )
  parser.add_argument('--repeats', type=int, default=11)
  options = parser.parse_args()
  rows: list[tables.Row] = []
  for model in options.models:
    with tempfile.TemporaryDirectory() as folder:
      found = list(measure(model, options, pathlib.Path(folder)))
    rows += found
    tables.write_json(options.json, rows)
    tables.show(found, ('work', 'epsilon', 'metric', 'value', 'unit'))


if __name__ == '__main__':
  main()
