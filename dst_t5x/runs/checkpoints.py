"""Saves and restores the training state of a run."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from absl import logging
import jax
import jax.numpy as jnp

from dst_t5x import subsets
from dst_t5x.checkpoints import run_folder
from dst_t5x.checkpoints import state_keys
from dst_t5x.core import stacking
from dst_t5x.core.errors import UserError
from dst_t5x.data import data_position
from dst_t5x.engine import finiteness
from dst_t5x.engine import trainer as trainer_lib
from dst_t5x.runs import extraction as extraction_lib
from dst_t5x.runs import history as history_lib
from dst_t5x.runtime import processes

PyTree = Any

_all_finite = jax.jit(finiteness.all_finite)


class Restored(NamedTuple):
  """The content of a checkpoint.

  Attributes:
    params: the trained parameters, unstacked, on the host.
    rest: the other fields of `trainer.TrainState`, except `step`.
    position: the position in the data.
  """

  params: PyTree
  rest: dict[str, PyTree]
  position: bytes


class Checkpoints:
  """The checkpoints of one run, and the history of their subsets."""

  def __init__(
    self,
    folder: run_folder.RunFolder,
    extraction: extraction_lib.Extraction | None,
    facts: Mapping[str, Any],
    record: Mapping[str, Any],
    keep_subsets: bool,
  ) -> None:
    """Reads nothing yet.

    Args:
      folder: the folder of the checkpoints.
      extraction: extracts subsets; None to save all trained parameters.
      facts: the metadata of subsets, except `step`.
      record: the content of `run.json`.
      keep_subsets: whether to keep the subset of each checkpoint as a file.
    """
    self.folder = folder
    self._extraction = extraction
    self._facts = facts
    self._record = record
    self._history = history_lib.History(folder.path, keep_subsets)

  def save(
    self, step: int, state: trainer_lib.TrainState, position: bytes
  ) -> history_lib.Report | None:
    """Starts to write a checkpoint; training can continue meanwhile.

    Args:
      step: the number of completed steps.
      state: the training state.
      position: the position in the data.

    Returns:
      The report on the subset, in the first process; None if there is no
      subset.

    Raises:
      UserError: it cannot be written, or the state is not finite.
    """
    # A step with a finite loss can leave parameters that are not finite.
    if not _all_finite(state):
      self.folder.wait()
      raise UserError(
        f'a parameter is not finite after step {step}: lower the learning '
        f'rate, or look at the data; {self.folder.what_is_whole}'
      )
    saved: dict[str, Any] = {'dense': state.params}
    subset = None
    if self._extraction is not None:
      subset = self._extraction.extract(state.params)
      saved = subsets.to_arrays(subset)
    flat = state_keys.flatten(_rest(state), state.params)
    # Copies, because the next step donates these arrays while they are written.
    saved, flat = jax.tree.map(_copy, (saved, flat))
    about = {'step': step, **self._facts}
    self.folder.save(
      step,
      saved,
      flat,
      data_position.merge(position, processes.gather_bytes),
      about | {'run': self._record},
    )
    if self._extraction is None or subset is None or not processes.is_first():
      return None
    moved = history_lib.distances_from_seed(
      subset, self._extraction.seed, self._facts['distance'] or ''
    )
    return history_lib.Report(
      self._history.add(step, subset, about), history_lib.histogram(moved)
    )

  def parameters(self, step: int) -> PyTree:
    """Returns a checkpoint's trained parameters, unstacked, on the host."""
    return self._load(step)[0]

  def _load(self, step: int) -> tuple[PyTree, subsets.Subset | None]:
    """Returns a checkpoint's parameters, and its subset if it has one."""
    saved = self.folder.parameters(step)
    if self._extraction is None:
      return stacking.unstack_layers(saved['dense']), None
    subset = subsets.from_arrays(saved)
    return self._extraction.apply(subset), subset

  def restore(self, step: int, like: trainer_lib.TrainState) -> Restored:
    """Returns the content of a checkpoint to continue from.

    Args:
      step: the checkpoint's step.
      like: an abstract training state with shardings.
    """
    params, subset = self._load(step)
    if subset is not None:
      self._history.resume(step, subset)
    abstract = _rest(like)
    flat = self.folder.state(step, state_keys.flatten(abstract, like.params))
    rest = state_keys.unflatten(abstract, like.params, flat)
    logging.info('resumed %s at step %d', self.folder.path, step)
    return Restored(
      params,
      {field: rest[name] for field, name in _REST.items()},
      self.folder.position(step),
    )


# Field of a training state -> its name in a checkpoint.
_REST = {
  'opt_state': state_keys.OPTIMIZER,
  'projection_state': 'projection',
  'refused_steps': 'refused_steps',
  'refused_in_row': 'refused_in_row',
}


def _rest(state: trainer_lib.TrainState) -> dict[str, PyTree]:
  """Returns the state without parameters and step, by names in a checkpoint."""
  return {name: getattr(state, field) for field, name in _REST.items()}


def _copy(x: Any) -> Any:
  return jnp.copy(x) if isinstance(x, jax.Array) else x
