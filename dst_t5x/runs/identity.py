"""The identity of a run, and checks that a MODEL_DIR belongs to the run.

A run is identified by its settings, its seed and, if known, its training rows.
`run.json` and each checkpoint record the identity. A run therefore never
continues from another run's parameters, even if `run.json` is lost or
exchanged.

`run.json` is an object:

    format      `formats.FORMAT`
    task        the task's name
    model       the network's id and settings
    method      the method: `{"method": "dst", "epsilon": 0.0001, …}`
    optimizer   the optimizer's id and settings, with the learning rate's
    trainer     the other settings of a step: loss, microbatches
    data        the settings of batches
    random_seed, from_scratch
    other       id -> settings of functions that code calls and gin configures
                without a reference: the vocabulary, a user's own task
    rows        task -> what identifies its rows
    seed        path, format, step and fingerprint; null from scratch
    version     the version of the package that wrote the file

Ids are those of `core.stable_ids`. They contain no module paths, so that a
module can move. All settings are recorded, defaults included.
"""

from collections.abc import Callable, Iterable, Mapping
import dataclasses
import os
from typing import Any

from etils import epath

from dst_t5x.checkpoints import run_folder
from dst_t5x.config import described
from dst_t5x.core import json_text
from dst_t5x.core import stable_ids
from dst_t5x.core.errors import UserError
from dst_t5x.models import adapted
from dst_t5x.runs import methods

# Parameters of `training.train` that may differ between two calls for the same
# run, because they do not change the computation of a step.
_MAY_CHANGE = frozenset(
  [
    'model_dir',
    'initial_checkpoint_path',  # The seed is compared by its fingerprint.
    'only_check',
    'plan',
    'evaluation',
    'partitioner',
  ]
)
# Ids in `other` that may differ, too: they are of evaluations.
_OTHER_MAY_CHANGE = frozenset(['held_out_text'])
_CHOOSE = 'go on with that, or choose another MODEL_DIR'


@dataclasses.dataclass(frozen=True)
class Identity:
  """The settings that identify a run.

  Attributes:
    settings: their record in `run.json`; JSON.
    defaults: dotted names of the settings that have their default.
  """

  settings: Mapping[str, Any]
  defaults: frozenset[str] = frozenset()

  def is_default(self, name: str) -> bool:
    """Returns whether a setting, or one that contains it, has its default."""
    parts = name.split('.')
    ends = range(1, len(parts) + 1)
    return any('.'.join(parts[:end]) in self.defaults for end in ends)


def of(
  binary: Callable[..., Any], recorded: Mapping[str, Any] | None = None
) -> Identity:
  """Returns the identity of the run that gin now configures.

  Args:
    binary: `training.train`.
    recorded: `sources.Source.recorded` of the training data, which replaces
      what gin says of it.

  Raises:
    UserError: a setting of the method is invalid, or gin has another setting
      than is recorded.
  """
  train, unreferenced = described.calls(binary)
  tree = {k: v for k, v in train.settings.items() if k not in _MAY_CHANGE}
  trainer, tree['trainer'] = _take(tree['trainer'], *_OF_TRAINER)
  data, tree['data'] = _take(tree.pop('train_data'), 'task', 'source')
  tree['model'], adapter = _without_adapter(trainer['network'])
  tree['task'], tree['optimizer'] = data['task'], trainer['optimizer']
  tree['other'] = _by_id(
    (scope, call)
    for scope, call in unreferenced
    if stable_ids.stable_id(call.function) not in _OTHER_MAY_CHANGE
  )
  projection = trainer['projection']
  said = described.to_json(tree)
  said['method'] = methods.settings(projection, adapter, trainer['trained'])
  said = _with_recorded(said, recorded or {})
  defaults = described.defaults_in(tree).union(
    described.defaults_in({'method': projection}),
    described.defaults_in({'method': adapter}),
  )
  return Identity(json_text.loads(json_text.dumps(said)), defaults)


def _with_recorded(
  said: dict[str, Any], recorded: Mapping[str, Any]
) -> dict[str, Any]:
  """Returns the settings with those that are recorded of the data.

  What gin leaves open in `other`, such as the VOCABULARY, is as recorded.

  Raises:
    UserError: gin has another value.
  """
  ours, there = said['other'], recorded.get('other', {})
  theirs = dict(json_text.flat(there))
  for name, value in json_text.flat(ours):
    if value is not None and name in theirs and theirs[name] != value:
      raise UserError(
        f'the batches were made with {name} = {theirs[name]!r}, not {value!r}:'
        ' set it to that, or prepare batches with the other value'
      )
  return {**said, **recorded, 'other': {**ours, **there}}


# What is recorded elsewhere, and SEED_DTYPE, which changes no result.
_OF_TRAINER = ('network', 'optimizer', 'projection', 'trained', 'seed_dtype')


def _take(
  call: described.Call, *names: str
) -> tuple[dict[str, Any], described.Call]:
  """Returns the named settings of a call, and the call without them."""
  rest = {k: v for k, v in call.settings.items() if k not in names}
  return {name: call.settings.get(name) for name in names}, call._replace(
    settings=rest
  )


def _without_adapter(network: Any) -> tuple[Any, described.Call | None]:
  """Returns the configured network without its adapter, and the adapter."""
  if network is None or network.function is not adapted.with_adapter:
    return network, None
  return network.settings['network'], network.settings['adapter']


def _by_id(
  calls: Iterable[tuple[str, described.Call]],
) -> dict[str, Any]:
  """Returns `scope/id`, or the id alone, -> the call, or a list of calls."""
  found: dict[str, list[described.Call]] = {}
  for scope, call in calls:
    name = stable_ids.stable_id(call.function)
    found.setdefault(f'{scope}/{name}' if scope else name, []).append(call)
  return {name: c[0] if len(c) == 1 else c for name, c in found.items()}


def records(model_dir: str | os.PathLike[str]) -> list[dict[str, Any]]:
  """Returns the records of a folder's run.

  Args:
    model_dir: MODEL_DIR.

  Returns:
    The records in `run.json` and in the last checkpoint, as many as exist; []
    for a folder without a run.

  Raises:
    UserError: a file is damaged or has a newer format, or there are checkpoints
      and no record.
  """
  path = epath.Path(model_dir)
  found = []
  if run_folder.is_run(path):
    found.append(run_folder.read_run_file(path))
  about = run_folder.last_about(path)
  if about is not None and 'run' in about:
    found.append(about['run'])
  if about is not None and not found:
    raise UserError(
      f'MODEL_DIR {path} has checkpoints, but no run.json, and nothing says '
      'which run they are of: put the file back, or choose another MODEL_DIR'
    )
  return found


def check(model_dir: str | os.PathLike[str], identity: Identity) -> None:
  """Checks that the folder is empty or belongs to a run.

  A setting that the folder's record lacks was added to the package later, and
  must have its default.

  Args:
    model_dir: MODEL_DIR.
    identity: the run's identity.

  Raises:
    UserError: the folder's run had another setting.
  """
  ours = dict(json_text.flat(identity.settings))
  for record in records(model_dir):
    settings = {k: v for k, v in record.items() if k not in _NO_SETTINGS}
    theirs = dict(json_text.flat(settings))
    for name in sorted(ours.keys() | theirs.keys(), key=_ids_first):
      if name not in theirs and identity.is_default(name):
        continue
      old, new = theirs.get(name), ours.get(name)
      if json_text.dumps(old, sort_keys=True) != json_text.dumps(
        new, sort_keys=True
      ):
        raise UserError(
          f'the run in MODEL_DIR {epath.Path(model_dir)} has {name} = {old!r}, '
          f'not {new!r}: {_CHOOSE}'
        )


# The keys of a record that are not settings.
_NO_SETTINGS = ('format', 'rows', 'seed', 'version')


def _ids_first(name: str) -> tuple[bool, str]:
  """Returns a sort key: ids first, as another class explains other settings."""
  is_id = name.rpartition('.')[2] in ('id', 'function', methods.NAME)
  return not is_id, name


def check_seed(
  model_dir: str | os.PathLike[str], reference: Mapping[str, Any] | None
) -> None:
  """Checks that the folder is empty or its run started from this seed.

  Args:
    model_dir: MODEL_DIR.
    reference: `Seed.reference` of the seed; None from scratch.

  Raises:
    UserError: the folder's run started from another seed.
  """
  for record in records(model_dir):
    before = record['seed']
    if (before or {}).get('fingerprint') != (reference or {}).get(
      'fingerprint'
    ):
      raise UserError(
        f'the run in MODEL_DIR {epath.Path(model_dir)} started from another '
        f'seed, {before["path"] if before else "random parameters"}: {_CHOOSE}'
      )


def check_rows(
  model_dir: str | os.PathLike[str], rows: Mapping[str, Any]
) -> None:
  """Checks that the folder is empty or its run was trained on these rows.

  Args:
    model_dir: MODEL_DIR.
    rows: `task_checks.rows_of` the training data.

  Raises:
    UserError: the folder's run was trained on other rows.
  """
  for record in records(model_dir):
    before = record.get('rows', rows)
    for task in sorted(before.keys() | rows.keys()):
      old, new = before.get(task), rows.get(task)
      if old != new:
        raise UserError(
          f'the run in MODEL_DIR {epath.Path(model_dir)} was trained on other '
          f'rows of task {task!r}: {_told(old)}, not {_told(new)}; put the old '
          'data back, or choose another MODEL_DIR'
        )


def _told(rows: Mapping[str, Any] | None) -> str:
  """Returns `file TRAIN_FILE, rows 600, sha256 0123456789ab…`."""
  texts = {name: str(value) for name, value in (rows or {}).items()}
  return ', '.join(
    f'{name} {text if len(text) < 24 else f"{text[:12]}…"}'
    for name, text in texts.items()
  )
