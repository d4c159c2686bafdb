"""Run folders, and their checkpoints: the subset, not the model.

A run folder holds `run.json` and `checkpoints/STEP/`. `run.json` identifies the
run, so that no other run continues it by mistake. Orbax writes checkpoints in
the background. A checkpoint refers to its seed by path and fingerprint, and has
no copy of it. Its items:

    about        JSON: the format, the run's identity, the step, the metadata of
                 docs/subset_format.md
    parameters   the subset, or `dense`: all trained parameters
    state        the states of optimizer and projection, see `state_keys`
    data         `position`, the position in the data
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
import contextlib
import os
from typing import Any

from etils import epath
import jax
import numpy as np
import orbax.checkpoint as ocp

from dst_t5x.checkpoints import checkpoint_files
from dst_t5x.checkpoints import formats
from dst_t5x.checkpoints import orbax_on_s3
from dst_t5x.core import json_object
from dst_t5x.core import json_text
from dst_t5x.core import object_stores
from dst_t5x.core import whole_files
from dst_t5x.core.errors import UserError

PyTree = Any

_RUN_FILE = 'run.json'
_FOLDER = 'checkpoints'
_ITEMS = ('about', 'parameters', 'state', 'data')


def is_run(path: str | os.PathLike[str]) -> bool:
  """Returns whether a folder is a run folder."""
  return (epath.Path(path) / _RUN_FILE).exists()


def run_of(path: str | os.PathLike[str]) -> epath.Path | None:
  """Returns the run folder that a folder inside `checkpoints` belongs to.

  `checkpoints` itself counts too. Returns None for any other folder.
  """
  folder = epath.Path(path)
  for part in (folder, *folder.parents):
    if part.name == _FOLDER and is_run(part.parent):
      return part.parent
  return None


class RunFolder:
  """The checkpoints of one run."""

  def __init__(
    self,
    path: str | os.PathLike[str],
    keep: int = 1,
    best_of: Callable[[Collection[int]], int | None] = lambda steps: None,
    read_only: bool = False,
  ) -> None:
    """Opens a run folder, and keeps its checkpoints.

    Args:
      path: MODEL_DIR.
      keep: how many of the latest checkpoints to keep.
      best_of: maps the steps of checkpoints to the best one, which is kept too.
      read_only: whether to write and delete nothing.
    """
    self.path = epath.Path(path)
    if object_stores.scheme(path) == 's3':
      orbax_on_s3.enable()
    self._keep = max(keep, 1)
    self._best_of = best_of
    self._has_saved = False
    self._manager = ocp.CheckpointManager(
      checkpoint_files.absolute(self.path) / _FOLDER,
      item_names=_ITEMS,
      # `_restore_arrays` needs metadata, which Orbax has only with handlers.
      item_handlers={
        name: ocp.StandardCheckpointHandler() for name in ('parameters', 'data')
      },
      options=ocp.CheckpointManagerOptions(
        preservation_policy=self,
        enable_async_checkpointing=not read_only,
        cleanup_tmp_directories=not read_only,
        read_only=read_only,
      ),
    )

  def should_preserve(
    self, checkpoints: Sequence[Any], *, context: Any
  ) -> list[bool]:
    """Returns which checkpoints Orbax keeps after a save, one bool for each."""
    del context
    kept = self._kept([checkpoint.step for checkpoint in checkpoints])
    return [checkpoint.step in kept for checkpoint in checkpoints]

  def _kept(self, steps: Sequence[int]) -> set[int | None]:
    return {*sorted(steps)[-self._keep :], self._best_of(steps)}

  def tidy(self) -> None:
    """Waits for writes, then deletes checkpoints that are no longer kept.

    Deletes nothing if this object has saved nothing.

    Raises:
      UserError: a checkpoint could not be written or deleted.
    """
    self.wait()
    others = set(self.steps) - self._kept(self.steps)
    for step in others if self._has_saved else ():
      with self._one_line():
        self._manager.delete(step)

  @property
  def latest_step(self) -> int | None:
    """The step of the last whole checkpoint; None if there is none."""
    return self._manager.latest_step()

  @property
  def steps(self) -> list[int]:
    """The steps of all whole checkpoints, ascending."""
    return sorted(self._manager.all_steps())

  def save(
    self,
    step: int,
    parameters: Mapping[str, Any],
    state: Mapping[str, Any],
    position: bytes,
    about: Mapping[str, Any],
  ) -> None:
    """Starts to write a checkpoint; returns when its content is copied.

    Args:
      step: the number of steps done.
      parameters: `subsets.to_arrays` of the subset, or
        {'dense': trained parameters}.
      state: `state_keys.flatten` of the states of optimizer and projection.
      position: the position in the data.
      about: JSON, see the module.

    Raises:
      UserError: this or an earlier checkpoint could not be written.
    """
    args = ocp.args.Composite(
      about=ocp.args.JsonSave({'format': formats.FORMAT, **about}),
      parameters=ocp.args.StandardSave(dict(parameters)),
      state=ocp.args.StandardSave(dict(state)),
      data=ocp.args.StandardSave(
        {'position': np.frombuffer(position, np.uint8)}
      ),
    )
    self._has_saved = True
    with self._one_line():
      self._manager.save(step, args=args, force=True)

  def wait(self) -> None:
    """Waits until all checkpoints are written.

    Raises:
      UserError: one could not be written.
    """
    with self._one_line():
      self._manager.wait_until_finished()
      self._manager.check_for_errors()

  def close(self) -> None:
    """Waits until all checkpoints are written, and ends the background threads.

    Raises:
      UserError: one could not be written.
    """
    with self._one_line():
      self._manager.close()

  @property
  def what_is_whole(self) -> str:
    """A clause for messages: which checkpoint is whole."""
    # Read from the folder: after a failed save, the manager's list is wrong.
    return what_is_whole(self.path)

  @contextlib.contextmanager
  def _one_line(self) -> Iterator[None]:
    """Turns errors of writing into UserErrors of one line."""
    try:
      yield
    except (OSError, ValueError, RuntimeError) as e:
      raise UserError(
        f'cannot write a checkpoint to {self.path}: {_root(e)}; '
        f'{self.what_is_whole}'
      ) from e

  def about(self, step: int) -> dict[str, Any]:
    """Returns the `about` of a checkpoint, with its format.

    Raises:
      UserError: it cannot be read, or a newer version wrote it.
    """
    found = self._restore(step, about=ocp.args.JsonRestore())['about']
    where = f'checkpoint {step} of {self.path}'
    formats.check(json_object.JsonObject(found, where))
    return found

  def parameters(self, step: int) -> dict[str, Any]:
    """Returns a checkpoint's parameters, as NumPy arrays."""
    return self._restore_arrays(step, 'parameters')

  def state(self, step: int, like: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a checkpoint's state, with the shardings of `like`."""
    args = ocp.args.StandardRestore(dict(like))
    return self._restore(step, state=args)['state']

  def position(self, step: int) -> bytes:
    """Returns a checkpoint's position in the data."""
    return self._restore_arrays(step, 'data')['position'].tobytes()

  def _restore_arrays(self, step: int, item: str) -> dict[str, Any]:
    """Returns an item as NumPy arrays, complete in each process.

    By default, Orbax restores arrays to the devices that they were saved from,
    which may now belong to another process.
    """
    with self._reading(step):
      found = self._manager.item_metadata(step)[item]
      like = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), found.tree)
      restored = self._restore(step, **{item: ocp.args.StandardRestore(like)})
      return restored[item]

  def _restore(self, step: int, **items: Any) -> Any:
    with self._reading(step):
      return self._manager.restore(step, args=ocp.args.Composite(**items))

  @contextlib.contextmanager
  def _reading(self, step: int) -> Iterator[None]:
    """Turns errors of reading into UserErrors of one line."""
    try:
      yield
    except (OSError, ValueError, KeyError, AttributeError) as e:
      raise UserError(
        f'cannot read checkpoint {step} of {self.path}: '
        f'{str(e).splitlines()[0]}{self._remedy(step)}'
      ) from e

  def _remedy(self, step: int) -> str:
    """Returns advice for a checkpoint that cannot be read: use another one."""
    folder = self.path / _FOLDER
    others = [
      other
      for other in self.steps
      if other != step
      and all((folder / str(other) / item).exists() for item in _ITEMS)
    ]
    if not others:
      return ''
    return (
      f'; checkpoint {others[-1]} is whole: it counts once '
      f'{folder / str(step)} is removed'
    )


def _root(error: BaseException) -> str:
  """Returns the first line of an error's first cause."""
  while error.__cause__ is not None:
    error = error.__cause__
  return (str(error).splitlines() or [type(error).__name__])[0]


def _whole_steps(path: epath.Path) -> list[int]:
  """Returns the steps of a run's checkpoints that are whole."""
  folder = path / _FOLDER
  if not folder.exists():
    return []
  return [
    int(child.name)
    for child in folder.iterdir()
    if child.name.isdigit() and _is_whole(child)
  ]


def what_is_whole(path: epath.Path) -> str:
  """Returns a clause for messages: which checkpoint is whole."""
  steps = _whole_steps(path)
  if not steps:
    return 'there is no checkpoint yet'
  return f'checkpoint {max(steps)} is whole'


def _is_whole(checkpoint: epath.Path) -> bool:
  """Returns whether a folder named after a step holds a whole checkpoint."""
  if not object_stores.is_remote(checkpoint):
    return True  # It gets this name when it is whole.
  return (checkpoint / ocp.path.atomicity.COMMIT_SUCCESS_FILE).exists()


def last_about(path: epath.Path) -> dict[str, Any] | None:
  """Returns `RunFolder.about` of the last whole checkpoint; None if none.

  Reads the file without Orbax, which would wait for the other processes.

  Raises:
    UserError: it is damaged, or a newer version wrote it.
  """
  steps = _whole_steps(path)
  if not steps:
    return None
  file = path / _FOLDER / str(max(steps)) / _ITEMS[0] / 'metadata'
  said = json_object.read(file)
  formats.check(said)
  return said.content


def write_run_file(path: epath.Path, content: Mapping[str, Any]) -> None:
  """Writes `run.json` atomically, with the format number."""
  object_stores.make_folder(path)
  content = {'format': formats.FORMAT, **content}
  text = json_text.dumps(content, indent=2, sort_keys=True) + '\n'
  whole_files.write_text(path / _RUN_FILE, text)


def read_run_file(path: epath.Path) -> dict[str, Any]:
  """Returns the content of `run.json`.

  Raises:
    UserError: the file is damaged, or a newer version wrote it.
  """
  file = path / _RUN_FILE
  try:
    said = json_object.read(file)
    said.size('format')
  except UserError as e:
    raise UserError(f'{file} is damaged: {e}') from e
  formats.check(said)
  try:
    said.get('method', dict)
    said.get('seed', dict, None)
  except UserError as e:
    raise UserError(f'{file} is damaged: {e}') from e
  if 'seed' not in said.content:
    raise UserError(f'{file} is damaged: it does not say what the run is')
  return said.content
