"""Loads the seed: pretrained parameters in any known format."""

from collections.abc import Callable, Mapping
import contextvars
import dataclasses
import functools
import os
from typing import Any

from absl import logging
from etils import epath

from dst_t5x import subsets
from dst_t5x.adapters import api as adapters
from dst_t5x.adapters import known  # noqa: F401
from dst_t5x.checkpoints import checkpoint_files
from dst_t5x.checkpoints import finite
from dst_t5x.checkpoints import gguf_checkpoint
from dst_t5x.checkpoints import gguf_file
from dst_t5x.checkpoints import hf_checkpoint
from dst_t5x.checkpoints import peft_files
from dst_t5x.checkpoints import peft_folder
from dst_t5x.checkpoints import places
from dst_t5x.checkpoints import shira_files
from dst_t5x.checkpoints import t5x_checkpoint
from dst_t5x.core import errors
from dst_t5x.core import hub
from dst_t5x.core import json_object
from dst_t5x.core import object_stores
from dst_t5x.core import parts
from dst_t5x.core import stacking
from dst_t5x.models import api
from dst_t5x.models import families
from dst_t5x.subsets import fingerprint as fingerprint_lib

# The checkpoints whose seeds are being loaded, to detect cycles.
_seeds_of: contextvars.ContextVar[tuple[str, ...]] = contextvars.ContextVar(
  'seeds_of', default=()
)


@dataclasses.dataclass(frozen=True)
class Seed:
  """Pretrained parameters and where they come from.

  Attributes:
    params: unstacked nested dict of float32 NumPy arrays under T5X's names.
    path: the folder or file that they were read from; for T5X, the folder
      `checkpoint_<step>`.
    format: 't5x', 'hf' (Hugging Face), 'peft' (an adapter in the format of
      Hugging Face PEFT, with its base), 'gguf' (a GGUF file, dequantised),
      'dst' (a subset file, with its seed) or 'run' (a run of this package).
    step: the training step at which they were saved; 0 if unknown.
    adapter: the adapter to apply to the network; `params` includes its
      parameters.
    network: see `checkpoint_files.LoadedCheckpoint`; so are `companions`,
      `is_bfloat16` and `note`.
  """

  params: dict[str, Any]
  path: str
  format: str
  step: int
  adapter: adapters.Adapter = adapters.NONE
  network: api.Network | None = None
  companions: Callable[[], Mapping[str, bytes]] = dict
  is_bfloat16: bool = False
  note: str = ''

  def merged(self) -> 'Seed':
    """Returns the seed with the adapter merged into the network's parameters.

    Raises:
      UserError: the adapter cannot be merged, or the result is not finite.
    """
    if not self.adapter.added:
      return self
    params = parts.unflatten(self.adapter.merge(parts.flatten(self.params)))
    finite.check(params, self.path)
    return dataclasses.replace(self, params=params, adapter=adapters.NONE)

  @functools.cached_property
  def fingerprint(self) -> str:
    """The identity of the parameters: `fingerprint.fingerprint`."""
    return fingerprint_lib.fingerprint(self.params)

  @property
  def described(self) -> str:
    """Its format and step and what was done to its values, for a line."""
    about = f'format {self.format}, step {self.step}'
    return f'{about}, {self.note}' if self.note else about

  @property
  def reference(self) -> dict[str, Any]:
    """The record of this seed in checkpoints and subset files; JSON."""
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
  """Loads parameters, and logs their source and fingerprint.

  Args:
    path: one of the following, on a disk or in an object store (`gs://…`,
      `s3://…`): a T5X checkpoint, or a folder of them (the newest is taken); a
      Hugging Face model's folder; a folder with an adapter of Hugging Face
      PEFT; a file `….gguf` or `….dst`; a run folder of this package. Or a model
      or a subset on the Hugging Face Hub,
      `hf://organisation/name[@revision][/file.dst]`.
    step: the checkpoint of a run folder; the last if None.
    seed_path: the new path of a moved seed of a run or `.dst` file, or of a
      moved base of an adapter.

  Raises:
    UserError: the path has nothing of a known format, or it is damaged, of no
      known family, or has values that are not finite.
  """
  from dst_t5x.checkpoints import run_folder  # Orbax.

  if hub.is_path(path):
    return _from_hub(path, seed_path)
  is_subset, is_gguf = str(path).endswith('.dst'), gguf_file.is_file(path)
  with places.reached(path):
    is_file = is_subset or is_gguf
    folder = epath.Path(path) if is_file else places.existing_folder(path)
  if is_subset:
    kind, loaded = 'dst', _load_subset(folder, seed_path)
  elif is_gguf:
    kind, loaded = 'gguf', gguf_checkpoint.load(folder)
  elif run_folder.is_run(folder):
    kind, loaded = 'run', load_run(folder, step, seed_path)
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
  elif peft_folder.is_adapter(folder):
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
      ' (adapter_config.json), nor a run of this package (run.json); of GGUF,'
      ' name the file'
    )
  return _checked(Seed(path=str(folder), format=kind, **vars(loaded)))


def _from_hub(path: epath.PathLike, seed_path: str | None) -> Seed:
  """Returns what is on the Hugging Face Hub, under its commit's name.

  A repository is a model if it has a config.json, else its only subset.
  """
  if not hub.is_subset(path):
    folder, name = hub.snapshot(path)
    if hf_checkpoint.is_checkpoint(folder):
      loaded = hf_checkpoint.load(folder)
      return _checked(Seed(path=name, format='hf', **vars(loaded)))
  name = hub.only_subset(path)
  loaded = _load_subset(name, seed_path)
  return _checked(Seed(path=name, format='dst', **vars(loaded)))


def _checked(seed: Seed) -> Seed:
  """Returns the seed; refuses what is not finite, logs what was loaded."""
  finite.check(seed.params, seed.path)
  flat = parts.flatten(seed.params)
  logging.info(
    'Loaded %s (%s): %d tensors, %d parameters, fingerprint %s',
    seed.path,
    seed.described,
    len(flat),
    sum(array.size for array in flat.values()),
    seed.fingerprint,
  )
  return seed


def subset_and_seed(
  path: epath.PathLike, seed_path: str | None = None
) -> tuple[subsets.Subset, Seed, int]:
  """Returns a subset file's subset, seed and step.

  Args:
    path: the file.
    seed_path: the seed's path; by default the one that the file states.

  Raises:
    UserError: the file is damaged, or its seed cannot be loaded.
  """
  found, content = subsets.load(path)
  about = json_object.JsonObject(content, f'what {path} says')
  reference = about.inner('seed')
  seed_path = seed_path or _stated_seed(reference, path)
  seed = seed_of(reference.content, str(path), seed_path)
  return found, seed, about.get('step', int, 0)


def _stated_seed(
  reference: json_object.JsonObject, file: epath.PathLike
) -> str:
  """Returns the path of the seed that a file states, if it is safe to open.

  Of a seed on the Hub this is its place in the cache: the author of a file must
  not cause a download.
  """
  remedy = (
    'set INITIAL_CHECKPOINT_PATH, or use `python -m dst_t5x.subset apply'
    ' --seed=…` first'
  )
  if 'path' not in reference.content:
    raise errors.UserError(f'{file} does not say where its seed is: {remedy}')
  stated = reference.content['path']
  is_text = isinstance(stated, str) and stated.isprintable()
  if not (is_text and hub.is_path(stated)):
    return object_stores.stated_path(stated, file, 'its seed', remedy)
  try:
    return os.fspath(hub.cached(stated))
  except errors.UserError as e:
    raise errors.UserError(
      f'{file} names its seed, which is not downloaded unasked ({e}): {remedy}'
    ) from e


def _load_subset(
  path: epath.PathLike, seed_path: str | None
) -> checkpoint_files.LoadedCheckpoint:
  """Returns the parameters of a subset file applied to its seed."""
  found, seed, step = subset_and_seed(path, seed_path)
  params = subsets.apply(found, seed.params, seed.fingerprint)
  return checkpoint_files.LoadedCheckpoint(
    params, step, network=seed.network, companions=seed.companions
  )


def _load_adapter(
  folder: epath.Path, seed_path: str | None
) -> checkpoint_files.LoadedCheckpoint:
  """Returns the parameters of an adapter and of its base.

  Raises:
    UserError: the base cannot be found or is another one, or the adapter's kind
      is unknown.
  """
  about = peft_folder.about(folder)
  path = peft_folder.base_path(folder, about, seed_path)
  if about.seed is not None:
    base = seed_of(about.seed, f'the adapter in {folder}', path)
  else:
    base = load_seed(path).merged()
  adapter, note = adapters.NONE, ''
  if shira_files.is_adapter(folder):
    params, note = shira_files.load(folder, base.params)
  else:
    adapter, added = peft_files.load(folder, base.params)
    params = parts.join(base.params, parts.unflatten(added))
  return checkpoint_files.LoadedCheckpoint(
    params, about.step, adapter, base.network, base.companions, note=note
  )


def load_run(
  path: epath.PathLike,
  step: int | None = None,
  seed_path: str | None = None,
) -> checkpoint_files.LoadedCheckpoint:
  """Returns all parameters of a run's checkpoint, on the host.

  They include those of the run's adapter, if it has one.

  Args:
    path: a run folder of this package.
    step: the checkpoint; the last if None.
    seed_path: the path of its seed; by default the recorded one.

  Raises:
    UserError: there is no such checkpoint, or its seed cannot be loaded.
  """
  from dst_t5x.checkpoints import run_folder  # Orbax.

  folder = run_folder.RunFolder(path, read_only=True)
  try:
    if not folder.steps:
      raise errors.UserError(f'the run in {path} has no checkpoint yet')
    if step is not None and step not in folder.steps:
      raise errors.UserError(
        f'{path} has no checkpoint {step}, only {folder.steps}'
      )
    step = folder.steps[-1] if step is None else step
    content, parameters = folder.about(step), folder.parameters(step)
  finally:
    folder.close()
  about = json_object.JsonObject(content, f'checkpoint {step} of {path}')
  adapter = adapters.Adapter.from_json(about.get('adapter', dict))
  trained = stacking.unstack_layers(parameters.get('dense', {}))
  is_whole = bool(trained) and not about.get('is_partial', bool)
  reference = about.get('seed', dict, None)
  what = f'the run in {path}'
  if is_whole:
    return checkpoint_files.LoadedCheckpoint(
      trained,
      step,
      network=_network_of_run(about),
      companions=functools.partial(_companions, reference, what, seed_path),
    )
  seed = seed_of(about.get('seed', dict), what, seed_path)
  if trained:
    params = parts.join(seed.params, trained)
  else:
    params = subsets.apply(subsets.from_arrays(parameters), seed.params)
  return checkpoint_files.LoadedCheckpoint(
    params,
    step,
    adapter,
    network=_network_of_run(about) or seed.network,
    companions=seed.companions,
  )


def _network_of_run(about: json_object.JsonObject) -> api.Network | None:
  """Returns the network of a run; None if it is not one of ours.

  Args:
    about: what a checkpoint says about itself.

  Raises:
    UserError: it is damaged.
  """
  record = json_object.JsonObject(about.get('run', dict, {}), about.where)
  model = record.get('model', dict, {})
  where = f'model in {about.where}'
  return families.recorded(json_object.JsonObject(model, where))


def _companions(
  reference: Mapping[str, Any] | None, what: str, seed_path: str | None
) -> Mapping[str, bytes]:
  """Returns the companions of a seed that was not needed so far."""
  if reference is None:
    return {}
  try:
    return seed_of(reference, what, seed_path).companions()
  except errors.UserError as e:
    logging.warning('The tokenizer is left out: %s', e)
    return {}


def seed_of(
  reference: Mapping[str, Any], what: str, seed_path: str | None
) -> Seed:
  """Loads the seed that a checkpoint refers to.

  Args:
    reference: the seed's `fingerprint`, and if known its `path`, `format` and
      `step`; see `Seed.reference`.
    what: the checkpoint, for messages.
    seed_path: the seed's path; by default the one in `reference`.

  Raises:
    UserError: it cannot be loaded, or has another fingerprint.
  """
  said = json_object.JsonObject(dict(reference), f'the seed of {what}')
  fingerprint = said.get('fingerprint', str)
  path = seed_path or said.get('path', str)
  # A run that is a seed may have been trained further since.
  was_run = said.get('format', str, '') == 'run'
  step = said.get('step', int, None) if was_run and _is_run(path) else None
  if what in _seeds_of.get():
    raise errors.UserError(
      f'{what} is its own seed, directly or through others'
    )
  token = _seeds_of.set((*_seeds_of.get(), what))
  try:
    seed = load_seed(path, step).merged()
  except errors.UserError as e:
    raise errors.UserError(
      f'the seed of {what} cannot be loaded ({e}); if it was moved, set '
      'INITIAL_CHECKPOINT_PATH'
    ) from e
  finally:
    _seeds_of.reset(token)
  if seed.fingerprint != fingerprint:
    raise errors.UserError(
      f'{seed.path} is not the seed of {what}: its '
      f'fingerprint is {seed.fingerprint[:12]}…, not '
      f'{fingerprint[:12]}…'
    )
  return seed


def _is_run(path: epath.PathLike) -> bool:
  from dst_t5x.checkpoints import run_folder  # Orbax.

  return run_folder.is_run(path)
