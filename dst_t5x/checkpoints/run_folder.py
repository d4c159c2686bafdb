"""Checkpoints of our own runs: the subset, not the model.

A run folder holds `run.json` (what the run is, so that nothing else continues
it by mistake) and `checkpoints/STEP/`, written by Orbax in the background. A
checkpoint holds what training changed, the optimizer's state, the position in
the data, and the seed by path and fingerprint: no second copy of the model.

    about        JSON: the format, what the run is, the step, the metadata of
                 docs/subset_format.md
    parameters   the subset, or `dense`: what is trained
    state        see `state_keys`
    data         `position`
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
  """Whether a folder is that of a run of our own."""
  return (epath.Path(path) / _RUN_FILE).exists()


def run_of(path: str | os.PathLike[str]) -> epath.Path | None:
  """Returns the run whose checkpoints, or one of them, a folder holds."""
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
    """Opens a run folder; what is in it stays.

    Args:
      path: MODEL_DIR.
      keep: how many of the latest checkpoints to keep.
      best_of: steps of checkpoints -> the one that is kept besides, if any.
      read_only: whether nothing shall be written or cleaned up.
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
      # Else their metadata, which `_restore_arrays` needs, is not to be had.
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
    """Tells Orbax which checkpoints stay when another one is whole."""
    del context
    kept = self._kept([checkpoint.step for checkpoint in checkpoints])
    return [checkpoint.step in kept for checkpoint in checkpoints]

  def _kept(self, steps: Sequence[int]) -> set[int | None]:
    return {*sorted(steps)[-self._keep :], self._best_of(steps)}

  def tidy(self) -> None:
    """Waits, and deletes what is no more the best; only if anything was saved.

    Raises:
      UserError: something could not be written.
    """
    self.wait()
    others = set(self.steps) - self._kept(self.steps)
    for step in others if self._has_saved else ():
      with self._one_line():
        self._manager.delete(step)

  @property
  def latest_step(self) -> int | None:
    """The step of the last whole checkpoint, None if there is none."""
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
    """Begins to write a checkpoint; returns once its content is copied.

    Args:
      step: steps done.
      parameters: `subset.to_arrays`, or {'dense': what is trained}.
      state: `state_keys.flatten` of optimizer and projection state.
      position: the data's.
      about: what else a reader needs; JSON.

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
    """Waits until everything is written.

    Raises:
      UserError: something could not be.
    """
    with self._one_line():
      self._manager.wait_until_finished()
      self._manager.check_for_errors()

  def close(self) -> None:
    """Waits until everything is written, and ends the background threads.

    Raises:
      UserError: something could not be written.
    """
    with self._one_line():
      self._manager.close()

  @property
  def what_is_whole(self) -> str:
    """Which checkpoint there is, for messages."""
    # The manager loses count when a save fails.
    return what_is_whole(self.path)

  @contextlib.contextmanager
  def _one_line(self) -> Iterator[None]:
    """Turns what goes wrong while writing into one line."""
    try:
      yield
    except (OSError, ValueError, RuntimeError) as e:
      raise UserError(
        f'cannot write a checkpoint to {self.path}: {_root(e)}; '
        f'{self.what_is_whole}'
      ) from e

  def about(self, step: int) -> dict[str, Any]:
    """Returns what `save` was told about a checkpoint, and its format.

    Raises:
      UserError: it cannot be read, or a newer version wrote it.
    """
    found = self._restore(step, about=ocp.args.JsonRestore())['about']
    where = f'checkpoint {step} of {self.path}'
    formats.check(json_object.JsonObject(found, where))
    return found

  def parameters(self, step: int) -> dict[str, Any]:
    """Returns a checkpoint's `parameters`, as NumPy arrays."""
    return self._restore_arrays(step, 'parameters')

  def state(self, step: int, like: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a checkpoint's state, with the shardings of `like`."""
    args = ocp.args.StandardRestore(dict(like))
    return self._restore(step, state=args)['state']

  def position(self, step: int) -> bytes:
    """Returns the position in the data."""
    return self._restore_arrays(step, 'data')['position'].tobytes()

  def _restore_arrays(self, step: int, item: str) -> dict[str, Any]:
    """Returns an item as NumPy arrays, whole in each process.

    Without being told so, Orbax puts arrays where they were, on devices that
    may be another process's now.
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
    """Turns what goes wrong while reading into one line."""
    try:
      yield
    except (OSError, ValueError, KeyError, AttributeError) as e:
      raise UserError(
        f'cannot read checkpoint {step} of {self.path}: '
        f'{str(e).splitlines()[0]}{self._remedy(step)}'
      ) from e

  def _remedy(self, step: int) -> str:
    """Returns which checkpoint there is besides one that cannot be read."""
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
  """Returns the first line of what caused an error."""
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
  """Returns which checkpoint a run has, for messages."""
  steps = _whole_steps(path)
  if not steps:
    return 'there is no checkpoint yet'
  return f'checkpoint {max(steps)} is whole'


def _is_whole(checkpoint: epath.Path) -> bool:
  """Whether a folder with the name of a step is a checkpoint's."""
  if not object_stores.is_remote(checkpoint):
    return True  # It was renamed when it was.
  return (checkpoint / ocp.path.atomicity.COMMIT_SUCCESS_FILE).exists()


def last_about(path: epath.Path) -> dict[str, Any] | None:
  """Returns `RunFolder.about` of the last whole checkpoint, if there is one.

  Not by Orbax, which would wait for the other processes.

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
  """Writes what a run is, whole or not at all."""
  object_stores.make_folder(path)
  content = {'format': formats.FORMAT, **content}
  text = json_text.dumps(content, indent=2, sort_keys=True) + '\n'
  whole_files.write_text(path / _RUN_FILE, text)


def read_run_file(path: epath.Path) -> dict[str, Any]:
  """Returns what `write_run_file` wrote.

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
