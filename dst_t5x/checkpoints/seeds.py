"""The seed: pretrained parameters of any known format, and their identity."""

from collections.abc import Iterator, Mapping
from concurrent import futures
import contextlib
import dataclasses
import functools
import os
from typing import Any

from absl import logging
from etils import epath
from flax import traverse_util
import numpy as np

from dst_t5x import subsets
from dst_t5x.adapters import api as adapters
from dst_t5x.checkpoints import checkpoint_files
from dst_t5x.checkpoints import hf_checkpoint
from dst_t5x.checkpoints import peft_files
from dst_t5x.checkpoints import t5x_checkpoint
from dst_t5x.core import errors
from dst_t5x.core import json_object
from dst_t5x.core import object_stores
from dst_t5x.core import parts
from dst_t5x.models.t5 import sizes
from dst_t5x.subsets import fingerprint as fingerprint_lib


@dataclasses.dataclass(frozen=True)
class Seed:
  """Pretrained parameters and where they come from.

  Attributes:
    params: unstacked nested dict of float32 NumPy arrays under T5X's names.
    path: the folder that they were read from; of T5X, the one of the step.
    format: 't5x', 'hf' (Hugging Face), 'peft' (an adapter in the format of
      Hugging Face PEFT, with its base), 'dst' (a subset file, with its seed) or
      'run' (a run of this package).
    step: the training step at which they were saved; 0 if unknown.
    adapter: what the network needs besides, whose parameters are among these.
  """

  params: dict[str, Any]
  path: str
  format: str
  step: int
  adapter: adapters.Adapter = adapters.NONE

  def merged(self) -> 'Seed':
    """Returns the seed of an equal network without adapter.

    Raises:
      UserError: there is none.
    """
    if not self.adapter.added:
      return self
    params = parts.unflatten(self.adapter.merge(parts.flatten(self.params)))
    _check_finite(params, self.path)
    return Seed(params, self.path, self.format, self.step)

  @functools.cached_property
  def fingerprint(self) -> str:
    """Their identity, `fingerprint.fingerprint` of them."""
    return fingerprint_lib.fingerprint(self.params)

  @property
  def reference(self) -> dict[str, Any]:
    """What a checkpoint or a subset file says of its seed; JSON."""
    return {
      'name': '/'.join(epath.Path(self.path).parts[-2:]),
      'path': os.fspath(checkpoint_files.absolute(self.path)),
      'format': self.format,
      'step': self.step,
      'fingerprint': self.fingerprint,
    }


def load_seed(
  path: epath.PathLike, step: int | None = None, seed_path: str | None = None
) -> Seed:
  """Loads parameters and logs what was loaded.

  Args:
    path: a T5X checkpoint or a folder of them (the newest is taken), a Hugging
      Face T5 1.1 folder, a folder with an adapter of Hugging Face PEFT, a file
      `….dst`, or the folder of a run of this package (its last checkpoint). May
      be in an object store (`gs://…`, `s3://…`).
    step: another checkpoint of such a run.
    seed_path: where the seed of such a run or file, or the base of such an
      adapter is, if it was moved.

  Raises:
    UserError: there is nothing at the path, or nothing of a known format, or
      what is there is damaged or no T5 1.1, or not all of it is finite.
  """
  # The runs' module loads seeds itself; also, it needs far more to import.
  from dst_t5x.checkpoints import run_folder

  is_subset = str(path).endswith('.dst')
  with _reached(path):
    folder = epath.Path(path) if is_subset else _existing_folder(path)
  if is_subset:
    kind, loaded = 'dst', _load_subset(folder, seed_path)
  elif run_folder.is_run(folder):
    kind, loaded = 'run', run_folder.load_run(folder, step, seed_path)
  elif run := run_folder.run_of(folder):
    name = folder.name
    step_too = (
      f'; eval and infer take CHECKPOINT_STEP={name}' if name.isdigit() else ''
    )
    raise errors.UserError(
      f'{folder} is a part of the run in {run}: name that folder{step_too}'
    )
  elif step is not None:
    raise errors.UserError(f'CHECKPOINT_STEP needs a run folder, not {folder}')
  elif peft_files.is_adapter(folder):
    kind, loaded = 'peft', _load_adapter(folder, seed_path)
  elif t5x_checkpoint.is_checkpoint(folder):
    folder = t5x_checkpoint.find(folder)
    kind, loaded = 't5x', t5x_checkpoint.load(folder)
  elif hf_checkpoint.is_checkpoint(folder):
    kind, loaded = 'hf', hf_checkpoint.load(folder)
  else:
    raise errors.UserError(
      f'nothing to load in {folder}: neither a T5X checkpoint (file'
      ' checkpoint, or folders checkpoint_<step>), nor a Hugging Face model'
      ' (config.json and model.safetensors), nor an adapter of PEFT'
      ' (adapter_config.json), nor a run of this package (run.json)'
    )
  _check_finite(loaded.params, str(folder))
  seed = Seed(loaded.params, str(folder), kind, loaded.step, loaded.adapter)
  flat = traverse_util.flatten_dict(seed.params)
  logging.info(
    'Loaded %s (format %s, step %d): %d tensors, %d parameters, fingerprint %s',
    seed.path,
    seed.format,
    seed.step,
    len(flat),
    sum(array.size for array in flat.values()),
    seed.fingerprint,
  )
  return seed


def _load_subset(
  path: epath.Path, seed_path: str | None
) -> checkpoint_files.LoadedCheckpoint:
  """Returns the parameters of a seed with the values of a subset file.

  Raises:
    UserError: the file is damaged, or its seed is not to be had.
  """
  from dst_t5x.checkpoints import run_folder

  found, content = subsets.load(path)
  about = json_object.JsonObject(content, f'what {path} says')
  reference = about.inner('seed')
  if not seed_path and not reference.get('path', str, ''):
    raise errors.UserError(
      f'{path} does not say where its seed is: set INITIAL_CHECKPOINT_PATH'
    )
  seed_path = seed_path or object_stores.stated(
    reference.get('path', str),
    path,
    'its seed',
    'set INITIAL_CHECKPOINT_PATH, or use `python -m dst_t5x.subset apply'
    ' --seed=…` first',
  )
  seed = run_folder.seed_of(reference.content, str(path), seed_path)
  params = subsets.apply(found, seed.params, seed.fingerprint)
  return checkpoint_files.LoadedCheckpoint(params, about.get('step', int, 0))


def _load_adapter(
  folder: epath.Path, seed_path: str | None
) -> checkpoint_files.LoadedCheckpoint:
  """Returns the parameters of an adapter and of its base.

  Raises:
    UserError: the base is not there or is another one, or the adapter is of no
      known kind.
  """
  from dst_t5x.checkpoints import run_folder

  about = peft_files.about(folder)
  path = seed_path or about.base
  if path and not seed_path:
    object_stores.stated(
      path, folder, 'its base', 'set INITIAL_CHECKPOINT_PATH'
    )
  if not path or not (seed_path or epath.Path(path).is_dir()):
    raise errors.UserError(
      f'the base of {folder}, {json_object.shown(path)}, is no folder: set'
      ' INITIAL_CHECKPOINT_PATH to that of the base, or write it into'
      ' adapter_config.json as base_model_name_or_path'
    )
  if checkpoint_files.absolute(path) == checkpoint_files.absolute(folder):
    raise errors.UserError(f'{folder} is an adapter and cannot be its own base')
  if about.seed is not None:
    base = run_folder.seed_of(about.seed, f'the adapter in {folder}', path)
  else:
    base = load_seed(path).merged()
  adapter, added = peft_files.load(folder, base.params)
  params = parts.join(base.params, parts.unflatten(added))
  return checkpoint_files.LoadedCheckpoint(params, about.step, adapter)


def check_matches(
  params: Mapping[str, Any], expected: Mapping[str, Any]
) -> None:
  """Checks that a checkpoint is one of the configured model.

  Args:
    params: unstacked nested dict of arrays.
    expected: the same of `jax.ShapeDtypeStruct`.

  Raises:
    UserError: it has another vocabulary or size, or a tensor is missing,
      superfluous or misshapen; the first is named.
  """
  found = _shapes(params)
  wanted = _shapes(expected)
  if found == wanted:
    return
  _check_sizes(sizes.sizes(params), sizes.sizes(expected))
  for state, paths in (
    ('lacks', sorted(set(wanted) - set(found))),
    ('has, unlike the model,', sorted(set(found) - set(wanted))),
  ):
    if paths:
      raise errors.UserError(
        f'the checkpoint {state} tensor {paths[0]} ({len(paths)} in all); is'
        ' this the model file that belongs to it?'
      )
  path = min(path for path in wanted if found[path] != wanted[path])
  raise errors.UserError(
    f'tensor {path} is {found[path]} in the checkpoint, {wanted[path]} in the'
    ' model; is this the model file that belongs to it?'
  )


def _check_finite(params: Mapping[str, Any], path: str) -> None:
  """Refuses NaN and infinity, which would make any loss NaN much later."""
  flat = parts.flatten(params)

  def is_finite(array: np.ndarray) -> bool:
    # Both are NaN if one value is. No array of as many bools is made.
    return not array.size or bool(np.isfinite([array.max(), array.min()]).all())

  with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    finite = dict(zip(flat, pool.map(is_finite, flat.values()), strict=True))
  bad = [name for name in sorted(flat) if not finite[name]]
  if bad:
    array = flat[bad[0]]
    count = np.count_nonzero(~np.isfinite(array))
    raise errors.UserError(
      f'{path}: {count:,} of {array.size:,} values of tensor {bad[0]} are NaN'
      f' or infinite ({len(bad)} such tensors); take a checkpoint from before'
      ' training diverged, or one that was not cast to float16'
    )


@contextlib.contextmanager
def _reached(path: epath.PathLike) -> Iterator[None]:
  """Raises UserError where a bucket cannot be reached, whatever the client."""
  object_stores.check(path)
  try:
    yield
  except errors.UserError:
    raise
  except Exception as e:
    if not object_stores.is_remote(path):
      raise
    raise errors.UserError(
      f'cannot reach {path}: {object_stores.reason(e, path)}'
    ) from e


def _existing_folder(path: epath.PathLike) -> epath.Path:
  """Returns the path of a folder; names the nearest if it is misspelt."""
  folder = epath.Path(path).expanduser()
  if folder.is_dir():
    return folder
  if folder.exists():
    raise errors.UserError(f'{folder} is a file; give its folder')
  if object_stores.is_remote(folder):
    raise errors.UserError(
      f'there is no {folder}, or no such bucket{_nearest_beside(folder)}'
    )
  missing = folder
  while missing.parent != missing and not missing.parent.exists():
    missing = missing.parent
  known = []
  if missing.parent.is_dir():
    known = [child.name for child in missing.parent.iterdir()]
  raise errors.UserError(
    f'there is no {folder}: nothing called {missing.name!r} in'
    f' {missing.parent}{errors.nearest(missing.name, known)}'
  )


def _nearest_beside(folder: epath.Path) -> str:
  """Returns `; did you mean 'x'?` for what is beside a folder in a store."""
  if not object_stores.split(folder)[1]:
    return ''  # A bucket; others' are not ours to list.
  try:
    known = [child.name for child in folder.parent.iterdir()]
  except FileNotFoundError:
    known = []
  return errors.nearest(folder.name, known)


def _shapes(tree: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
  flat = traverse_util.flatten_dict(tree, sep='/')
  return {path: tuple(leaf.shape) for path, leaf in flat.items()}


def _check_sizes(found: Mapping[str, int], wanted: Mapping[str, int]) -> None:
  """Refuses a model of another vocabulary or size, in the config's terms."""
  different = {
    name: f'{name} is {found[name]} in the checkpoint, {wanted[name]} in the'
    ' model'
    for name in wanted
    if name in found and found[name] != wanted[name]
  }
  if list(different) == ['vocab_size']:
    raise errors.UserError(
      f'the checkpoint has another vocabulary: {different["vocab_size"]}'
      ' (tensor token_embedder/embedding)'
    )
  if different:
    raise errors.UserError(
      f'the checkpoint is of another size: {"; ".join(different.values())};'
      ' choose the model file that belongs to it'
    )
