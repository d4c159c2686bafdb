"""Checks, before a run starts, that it can."""

from collections.abc import Callable, Iterable, Iterator, Mapping
import contextlib
import dataclasses
import importlib.metadata
import json
import math
import os
import shutil
import time
from typing import Any
import uuid

from etils import epath
import jax

import dst_t5x
from dst_t5x.checkpoints import seeds
from dst_t5x.config import binaries
from dst_t5x.core import object_stores
from dst_t5x.core import whole_files
from dst_t5x.core.errors import UserError, writing
from dst_t5x.engine import budget as budget_lib
from dst_t5x.engine import evaluation as evaluation_lib
from dst_t5x.engine import held_out as held_out_lib
from dst_t5x.engine import parameters
from dst_t5x.engine import partitioning
from dst_t5x.engine import sources
from dst_t5x.engine import trainer as trainer_lib
from dst_t5x.runs import identity
from dst_t5x.runs import plan as plan_lib
from dst_t5x.runtime import processes

_GIB = 2**30
_PACKAGES = ('jax', 'jaxlib', 'numpy', 'flax', 'optax', 'orbax-checkpoint')


@dataclasses.dataclass(frozen=True)
class Found:
  """The result of a check in one process.

  Attributes:
    text: a line to print.
    same: name -> value that must be the same in all processes.
  """

  text: str = ''
  same: Mapping[str, Any] = dataclasses.field(default_factory=dict)


Check = Callable[[], Found]


@dataclasses.dataclass(frozen=True)
class Training:
  """The settings of a training run.

  Attributes:
    trainer: network, optimizer, projection and loss.
    train_data: the training data.
    evaluation: the settings of the evaluation.
    plan: the steps at which to log, evaluate and save.
    partitioner: the mesh, with all sizes chosen.
    space: the network's parameters.
    binary: the function that gin configures.
    seed_path: INITIAL_CHECKPOINT_PATH.
    from_scratch: whether to start from random parameters.
  """

  trainer: trainer_lib.Trainer
  train_data: sources.TrainData
  evaluation: evaluation_lib.Evaluation
  plan: plan_lib.Plan
  partitioner: partitioning.Partitioner
  space: parameters.ParameterSpace
  binary: Callable[..., Any]
  seed_path: str | None
  from_scratch: bool


def check_training(
  model_dir: str | os.PathLike[str],
  training: Training,
  with_seed: bool = False,
) -> None:
  """Runs the checks before training, and leaves no files behind.

  Args:
    model_dir: MODEL_DIR.
    training: the settings of the run.
    with_seed: whether to also load the seed, which training does itself, and to
      print the result of each check in the first process.

  Raises:
    UserError: a check failed in some process. All processes raise it, for the
      first failed check.
  """
  path = epath.Path(model_dir)
  with no_trace(path) as token:
    checks = _checks_of_training(path, training, token)
    if with_seed:
      checks.append(('seed', lambda: seed(path, training)))
    run_checks(checks, show=with_seed)


def _checks_of_training(
  model_dir: epath.Path, training: Training, token: str
) -> list[tuple[str, Check]]:
  """Returns the checks; arguments as in `check_training` and of `no_trace`."""
  trainer, partitioner = training.trainer, training.partitioner
  train_data, evaluation = training.train_data, training.evaluation
  space, plan = training.space, training.plan

  def configuration() -> Found:
    recorded = train_data.source.recorded
    identity.check(model_dir, identity.of(training.binary, recorded))
    rows = train_data.source.rows_of(train_data.task, 'train')
    identity.check_rows(model_dir, rows)
    trainer.seed_path(space.shapes, training.seed_path, training.from_scratch)
    trainer.room(space.shapes)
    bindings = binaries.bindings(training.binary)
    return Found(f'{len(bindings)} parameters set', bindings)

  def batch() -> Found:
    rows = train_data.batch_size
    trainer.check_batch_size(rows)
    partitioner.check_batch_size(rows, trainer.microbatches)
    each = rows // partitioner.groups // trainer.microbatches
    return Found(
      f'{rows} rows: {partitioner.groups} group(s) of devices × '
      f'{trainer.microbatches} microbatch(es) × {each}'
    )

  def training_data() -> Found:
    size = train_data.source.check_training(train_data, trainer.network)
    return Found(
      f'{train_data.task}, {size} pieces',
      {
        'the size of the vocabulary': size,
        'what is trained on': train_data.source.rows_of(
          train_data.task, 'train'
        ),
      },
    )

  def evaluation_works() -> Found:
    evaluation.check(trainer.network)
    metrics = evaluation.rehearse(trainer.network)
    same = {}
    if evaluation.held_out is not None:
      same['the held-out text'] = evaluation.held_out.about()
      if not training.from_scratch:
        metrics.append(held_out_lib.FORGETTING)
    plan.check_results(metrics)
    return Found(
      f'{evaluation.task}, split {evaluation.split}: {", ".join(metrics)}',
      same,
    )

  return [
    ('devices', devices),
    ('versions', versions),
    ('mesh', lambda: Found(str(partitioner))),
    ('data', training_data),
    ('batch', batch),
    ('evaluation', evaluation_works),
    ('MODEL_DIR', lambda: model_dir_writable(model_dir, token)),
    ('MODEL_DIR', lambda: model_dir_shared(model_dir, token)),
    ('configuration', configuration),
    ('disk', lambda: disk_space(model_dir, *written(trainer, space, plan))),
  ]


def run_checks(checks: Iterable[tuple[str, Check]], show: bool = False) -> None:
  """Runs the checks in order, each in all processes.

  Args:
    checks: names and checks, the same in all processes.
    show: whether the first process prints the result of each check.

  Raises:
    UserError: a check failed in some process. All processes raise it, for the
      first failed check.
  """
  for name, check in checks:
    start = time.monotonic()
    error, found = '', Found()
    try:
      found = check()
    except UserError as e:
      error = str(e).splitlines()[0]
    of_all = [
      json.loads(text)
      for text in processes.gather(
        json.dumps({'error': error, 'same': dict(found.same)})
      )
    ]
    _compare(of_all)
    if show and processes.is_first():
      seconds = time.monotonic() - start
      print(f'{name:<14}{found.text}  ({seconds:.1f} s)', flush=True)


def _compare(of_all: list[dict[str, Any]]) -> None:
  """Raises UserError for the first error, or the first difference."""
  for i, found in enumerate(of_all):
    if found['error']:
      alike = all(other['error'] == found['error'] for other in of_all)
      where = '' if alike else f', in {processes.name(i)}'
      raise UserError(f'{found["error"]}{where}')
  first = of_all[0]['same']
  for i, found in enumerate(of_all):
    for what in sorted(first.keys() | found['same'].keys()):
      ours, theirs = first.get(what), found['same'].get(what)
      if ours != theirs:
        raise UserError(
          f'{what} is {theirs} in {processes.name(i)}, and {ours} in '
          f'{processes.name(0)}'
        )


def devices() -> Found:
  """Checks that all processes have equally many devices of the same kind."""
  kind, count = jax.local_devices()[0].device_kind, jax.local_device_count()
  return Found(
    f'{jax.device_count()} of kind {kind}, {count} for each of '
    f'{jax.process_count()} process(es)',
    {'the kind of the devices': kind, 'the number of devices': count},
  )


def versions() -> Found:
  """Checks that all processes have the same versions of packages."""
  installed = {name: importlib.metadata.version(name) for name in _PACKAGES}
  same = {'dst_t5x': dst_t5x.__version__} | installed
  text = ', '.join(f'{name} {version}' for name, version in same.items())
  return Found(text, {f'the version of {k}': v for k, v in same.items()})


def model_dir_writable(path: epath.Path, token: str) -> Found:
  """Checks that each process can write to the folder; leaves a file there.

  Args:
    path: MODEL_DIR; made if it does not exist.
    token: a part of the files' names, the same in all processes.
  """
  object_stores.check_writable('MODEL_DIR', path)
  with writing(f'MODEL_DIR {path}'):
    mine = _token(path, token, jax.process_index())
    whole_files.write_text(mine, token)
  return Found(f'{path} can be written to')


def model_dir_shared(path: epath.Path, token: str) -> Found:
  """Checks that all processes have the same folder.

  It looks for the files of `model_dir_writable`, which must come first.
  """
  for process in range(jax.process_count()):
    if not _token(path, token, process).exists():
      raise UserError(
        f'MODEL_DIR {path} is not the same folder as in '
        f'{processes.name(process)}: all hosts need one shared folder'
      )
  return Found(f'is one folder for {jax.process_count()} process(es)')


def _token(path: epath.Path, token: str, process: int) -> epath.Path:
  return path / f'.preflight-{token}-{process}'


@contextlib.contextmanager
def no_trace(path: epath.Path) -> Iterator[str]:
  """Yields a token; then removes its files and the folders made for them."""
  missing = []
  if not object_stores.is_remote(path):
    missing = [p for p in (path, *path.parents) if not p.exists()]
  # `gather` waits until all processes have looked for missing folders.
  token = processes.gather(uuid.uuid4().hex[:8])[0]
  try:
    yield token
  finally:
    with contextlib.suppress(Exception):  # The file may not exist.
      _token(path, token, jax.process_index()).unlink()
    for folder in missing:  # Only the last process finds them empty.
      with contextlib.suppress(OSError):
        os.rmdir(folder)
  # Otherwise one could remove a folder that another has begun to use.
  processes.wait_for_all()


def disk_space(path: epath.Path, needed: int, what: str) -> Found:
  """Checks that a run's files fit on the disk.

  Args:
    path: MODEL_DIR, or a folder that it will be in.
    needed: the bytes that the run needs.
    what: the files that need them, for the message.
  """
  gib = f'{needed / _GIB:.3f} GiB'
  if object_stores.is_remote(path):
    return Found(f'{what} take {gib} in an object store')
  there = next(p for p in (path, *path.parents) if p.exists())
  free = shutil.disk_usage(there).free
  if free < needed:
    raise UserError(
      f'MODEL_DIR {path} has {free / _GIB:.3f} GiB left on its disk, and '
      f'{what} take {gib}'
    )
  return Found(f'{free / _GIB:.1f} GiB left; {what} take {gib}')


def written(
  trainer: trainer_lib.Trainer,
  space: parameters.ParameterSpace,
  plan: plan_lib.Plan,
) -> tuple[int, str]:
  """Returns the approximate bytes that a run writes, and for which files.

  The oldest checkpoint is deleted only after a new one is whole, so there is
  one more than the plan keeps. Logs are not counted.

  Args:
    trainer: network, optimizer, projection and loss.
    space: the network's parameters.
    plan: the steps at which to save, and how many checkpoints to keep.
  """

  def size(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))

  trained, _ = trainer.split(space.shapes)
  state = jax.eval_shape(trainer.init, trained)
  changing = size((state.opt_state, state.projection_state))
  checkpoints = plan.keep + 1 + (plan.keep_best_by is not None)
  what = f'{checkpoints} checkpoints'
  if not trainer.projection.constrains:
    return checkpoints * (changing + size(trained)), what
  budget = budget_lib.of_run(space.base_shapes, trained, trainer.projection)
  needed = checkpoints * (changing + budget.file_bytes)
  if plan.keep_subsets:
    subsets = math.ceil(plan.train_steps / plan.checkpoint_period)
    needed += subsets * budget.file_bytes
    what += f' and {subsets} subsets'
  return needed, what


def seed(model_dir: epath.Path, training: Training) -> Found:
  """Checks that each process can read the seed, and that it is the run's.

  Args:
    model_dir: MODEL_DIR.
    training: the settings of the run.
  """
  space = training.space
  path = training.trainer.seed_path(
    space.shapes, training.seed_path, training.from_scratch
  )
  if path is None:
    identity.check_seed(model_dir, None)
    return Found('none: training from scratch')
  found = seeds.load_seed(path).merged()
  space.check(found, base=True)
  training.trainer.check_seed(found.params, found.path)
  identity.check_seed(model_dir, found.reference)
  return Found(
    f'{found.path}, fingerprint {found.fingerprint[:12]}…',
    {'the fingerprint of the seed': found.fingerprint},
  )
