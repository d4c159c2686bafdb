"""The source contract: where the batches of a run come from.

`live` makes them with seqio and TensorFlow. `stored` reads what
`python -m dst_t5x.prepare_data TASK --batches DIR` wrote, and needs neither.
Training and evaluation use a source only through this interface.
"""

import abc
from collections.abc import Callable, Iterable, Iterator, Mapping
import contextlib
import dataclasses
from typing import Any, Protocol

import numpy as np

from dst_t5x.core import values
from dst_t5x.core.errors import UserError
from dst_t5x.data import data_position
from dst_t5x.models import api

PyTree = Any
Batch = Mapping[str, np.ndarray]
# (params, (index, features) of examples) -> (index, tokens) of each.
Predict = Callable[
  [PyTree, Iterable[tuple[int, Mapping[str, Any]]]],
  list[tuple[int, np.ndarray]],
]


class Scorer(Protocol):
  """Decodes examples, and scores the predictions or writes them."""

  @property
  def texts(self) -> Mapping[str, str]:
    """`task/name` -> text of a metric, from the last call."""

  def __call__(self, params: PyTree, step: int) -> dict[str, float]:
    """Returns `task/metric` -> value, in the task's own units."""


@dataclasses.dataclass(frozen=True)
class Examples:
  """The examples of a split, for an evaluation.

  Attributes:
    task: the name of a task or mixture.
    feature_lengths: feature -> longest length; longer examples are truncated.
    split: the name of the split.
    batch_size: the number of examples in a batch, rounded up so that the
      devices share it evenly.
    num_examples: the number of examples of each task; None for all.
  """

  task: str
  feature_lengths: Mapping[str, values.Positive]
  split: str = 'validation'
  batch_size: values.Positive = 32
  num_examples: values.Positive | None = None


@dataclasses.dataclass(frozen=True)
class Stretch:
  """The steps of which a run needs the batches.

  Attributes:
    random_seed: determines the order.
    step: training steps already done; the first item has the next number.
    position: the position saved after that step; None for the start.
    save_after: returns whether the item of a step must have its position.
    place: called on every numpy batch, for example to put it on the device.
    rows: bool [batch_size], which rows this process needs; None for all.
  """

  random_seed: int
  step: int = 0
  position: bytes | None = None
  save_after: Callable[[int], bool] = lambda step: False
  place: Callable[[Batch], Any] = lambda batch: batch
  rows: np.ndarray | None = None


class Source(abc.ABC):
  """Where batches come from."""

  @property
  @abc.abstractmethod
  def recorded(self) -> Mapping[str, Any]:
    """Entries of `run.json` that replace those of gin's configuration."""

  @abc.abstractmethod
  def check_training(self, data: 'TrainData', network: api.Network) -> int:
    """Returns the size of the vocabulary, after checks.

    Raises:
      UserError: data is missing or wrong, or does not fit the network.
    """

  @abc.abstractmethod
  def rows_of(self, task: str, split: str) -> dict[str, Any]:
    """Returns what identifies the rows of a split, as JSON."""

  @abc.abstractmethod
  def encode(self, task: str) -> Callable[[str], list[int]]:
    """Returns a function: a text -> its ids in the task's vocabulary."""

  @abc.abstractmethod
  def train_batches(
    self, data: 'TrainData', network: api.Network, stretch: Stretch
  ) -> contextlib.AbstractContextManager[Iterator[data_position.TrainItem]]:
    """Returns the training batches after a step."""

  @abc.abstractmethod
  def check(
    self, examples: Examples, network: api.Network, in_chat: bool = True
  ) -> None:
    """Reads the first examples.

    Args:
      examples: which ones.
      network: the model; it must have an embedding for each id.
      in_chat: whether a chat template, if there is one, must have an effect.
        Without it, texts may end with another token than answers.

    Raises:
      UserError: data is missing or wrong, or does not fit the network.
    """

  @abc.abstractmethod
  def batches(
    self, examples: Examples, network: api.Network, batch_size: int
  ) -> Iterator[Batch]:
    """Yields the examples once and in order, for teacher forcing.

    Args:
      examples: which ones.
      network: whose features to make.
      batch_size: rows of every batch; the last is padded with rows of zeros.

    Yields:
      Model features `[batch_size, length]`.
    """

  @abc.abstractmethod
  def counts_bytes(self, examples: Examples) -> bool:
    """Returns whether the bytes of the examples' texts are known.

    They are for documents, and for a whole split only.
    """

  @abc.abstractmethod
  def bytes_of(self, examples: Examples) -> int | None:
    """Returns the bytes of the examples' texts; None if not known."""

  @abc.abstractmethod
  def metrics(self, examples: Examples, network: api.Network) -> list[str]:
    """Returns the names of the metrics of `scorer`, after a rehearsal.

    Raises:
      UserError: a task cannot be scored.
    """

  @abc.abstractmethod
  def scorer(
    self,
    examples: Examples,
    network: api.Network,
    predict: Predict,
    output_dir: str,
  ) -> Scorer:
    """Returns what decodes and scores the examples.

    Args:
      examples: which ones.
      network: the model.
      predict: decodes examples with given parameters.
      output_dir: the folder of the predictions.
    """


@dataclasses.dataclass(frozen=True)
class TrainData:
  """The training data.

  Attributes:
    task: the name of a task or mixture.
    feature_lengths: feature -> tokens per row; longer examples are truncated.
    batch_size: the number of rows of a batch, over all devices.
    source: where the batches come from.
    pack: whether several short examples share a row.
    shards: the number of parts into which seqio divides the data. Each part
      fills its share of the rows of every batch, and a process reads only the
      parts that its devices need. Batches depend on this number, but not on the
      number of processes.
  """

  task: str
  feature_lengths: Mapping[str, values.Positive]
  batch_size: values.Positive
  source: Source
  pack: bool = True
  shards: values.Positive = 1

  def __post_init__(self) -> None:
    values.check_fields(self)
    if self.batch_size % self.shards:
      raise UserError(
        f'BATCH_SIZE = {self.batch_size} is not a multiple of DATA_SHARDS = '
        f'{self.shards}'
      )
