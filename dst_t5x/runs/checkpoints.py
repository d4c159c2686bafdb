"""The checkpoints of a run: what is saved of a training state, and restored."""

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
  """What a checkpoint holds.

  Attributes:
    params: what was trained, unstacked, on the host.
    rest: the other fields of `trainer.TrainState` but the step.
    position: the data's.
  """

  params: PyTree
  rest: dict[str, PyTree]
  position: bytes


class Checkpoints:
  """The checkpoints of one run, and the subsets that it kept of them."""

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
      folder: where they are.
      extraction: from the seed, where a subset of it is what is saved.
      facts: metadata of a subset, but for its step.
      record: what `run.json` says.
      keep_subsets: whether the subset of each checkpoint gets a file.
    """
    self.folder = folder
    self._extraction = extraction
    self._facts = facts
    self._record = record
    self._history = history_lib.History(folder.path, keep_subsets)

  def save(
    self, step: int, state: trainer_lib.TrainState, position: bytes
  ) -> history_lib.Report | None:
    """Begins to write a checkpoint; training may go on meanwhile.

    Args:
      step: steps done.
      state: the training state.
      position: the data's.

    Returns:
      What there is to say of the subset, if there is one.

    Raises:
      UserError: it cannot be written, or parameters are not finite.
    """
    # A finite loss may precede parameters that are not.
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
    # The next step overwrites these arrays while they are being written.
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
    """Returns what was trained up to a checkpoint, unstacked, on the host."""
    return self._load(step)[0]

  def _load(self, step: int) -> tuple[PyTree, subsets.Subset | None]:
    """Returns the parameters of a checkpoint, and its subset if it has one."""
    saved = self.folder.parameters(step)
    if self._extraction is None:
      return stacking.unstack_layers(saved['dense']), None
    subset = subsets.from_arrays(saved)
    return self._extraction.apply(subset), subset

  def restore(self, step: int, like: trainer_lib.TrainState) -> Restored:
    """Goes on from a checkpoint.

    Args:
      step: its step.
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


# Fields of a training state -> what they are called in a checkpoint.
_REST = {
  'opt_state': state_keys.OPTIMIZER,
  'projection_state': 'projection',
  'refused_steps': 'refused_steps',
  'refused_in_row': 'refused_in_row',
}


def _rest(state: trainer_lib.TrainState) -> dict[str, PyTree]:
  """Returns what else a checkpoint holds, besides parameters and step."""
  return {name: getattr(state, field) for field, name in _REST.items()}


def _copy(x: Any) -> Any:
  return jnp.copy(x) if isinstance(x, jax.Array) else x
