"""A seqio source of rows that gin's files hold."""

import abc
from typing import Any

import seqio
import tensorflow as tf

_SHUFFLE_BUFFER = 10_000


class FileSource(seqio.DataSource, abc.ABC):
  """Rows of the splits `train`, `validation` and `test`, read in order."""

  def __init__(self) -> None:
    super().__init__(splits=('train', 'validation', 'test'))

  @property
  def supports_arbitrary_sharding(self) -> bool:
    """False: a row cannot be found without reading what is before it."""
    return False

  @abc.abstractmethod
  def dataset(self, split: str) -> tf.data.Dataset:
    """Returns the rows of a split, each once, in the files' order.

    Raises:
      UserError: a file is not set.
    """

  def get_dataset(
    self,
    split: str = 'train',
    shuffle: bool = True,
    seed: int | None = None,
    shard_info: seqio.ShardInfo | None = None,
    **unused: Any,
  ) -> tf.data.Dataset:
    """Returns the rows, each once, shuffled within a buffer."""
    del unused
    dataset = self.dataset(split)
    if shard_info is not None:
      dataset = dataset.shard(shard_info.num_shards, shard_info.index)
    return dataset.shuffle(_SHUFFLE_BUFFER, seed) if shuffle else dataset
