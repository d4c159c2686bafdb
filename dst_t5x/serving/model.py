"""Decodes each row with its own subset, on one seed on the device."""

from collections.abc import Callable, Hashable, Iterator, Sequence
import contextlib
import functools
from typing import Any, NamedTuple

from absl import logging
import cachetools
import jax
import jax.numpy as jnp
import numpy as np

from dst_t5x import subsets as subset_lib
from dst_t5x.core.errors import UserError, check_positive
from dst_t5x.models import api
from dst_t5x.models import decoding
from dst_t5x.serving import batches
from dst_t5x.serving import corrections
from dst_t5x.serving import integrity
from dst_t5x.serving import slots as slots_lib
from dst_t5x.subsets import extraction
from dst_t5x.subsets import on_device

PyTree = Any
Decoder = batches.Decoder

GREEDY = decoding.GreedyDecoder()
# Each row has its own settings; see `Row`.
SAMPLING = decoding.Sampling()
# The largest share of the parameters for a subset that is mixed with others.
# Above it, one batch per subset is faster; see benchmarks/README.md.
MIX_UP_TO = 1e-3


class Row(NamedTuple):
  """One input to decode.

  Attributes:
    tokens: int32 [length], the feature `inputs` of a task.
    subset: the subset's key in the cache of placed subsets; None for the seed.
    load: returns the subset; called if it is not on the device.
    sampling: how to draw the answer, if the decoder is `SAMPLING`.
    number: the number of the input in its request; see `decoding.Sampling`.
  """

  tokens: np.ndarray
  subset: Hashable | None = None
  load: Callable[[], subset_lib.Subset] | None = None
  sampling: decoding.Sampling = SAMPLING
  number: int = 0


class Answer(NamedTuple):
  """The result for one row.

  Attributes:
    tokens: int32 [length], with the end token if it was reached.
    score: the decoder's score; not finite if the logits were not.
  """

  tokens: np.ndarray
  score: float


class Mixture(NamedTuple):
  """Subsets of rows that are decoded with the seed's parameters.

  Attributes:
    arrays: each row's subset, all of one class.
    slots: the slots of the rooms.
    rooms: static; large enough for each subset.
  """

  arrays: tuple[on_device.Arrays, ...]
  slots: slots_lib.Slots
  rooms: on_device.Rooms


class MultiSubsetModel:
  """Decodes with any subset of one seed.

  Not thread-safe: use it from one thread only.

  Attributes:
    network: the network.
    layout: the layout of the seed.
    max_decode_length: the most tokens to decode.
    input_length: the most tokens of an input; None if unknown.
    placed: the subsets on the device, by `Row.subset`. A cache with a limit in
      bytes, which evicts the least recently used.
    max_batch: the most rows in a batch.
    most_mixed: the most entries of a subset that is mixed with others.
    counts: number of events: `swaps`, `device_hits`, `device_misses`,
      `restored`.
  """

  def __init__(
    self,
    network: api.Network,
    load_seed: Callable[[], PyTree],
    fingerprint: str,
    *,
    max_decode_length: int,
    input_length: int | None = None,
    device_bytes: int = 2**30,
    mix_up_to: float = MIX_UP_TO,
    max_batch: int = 16,
  ) -> None:
    """Puts the seed on the device.

    Args:
      network: the model; its layers must not be stacked.
      load_seed: returns the seed, unstacked, on the host. Called again if a
        failure lost or changed the parameters on the device.
      fingerprint: the seed's fingerprint.
      max_decode_length: the most tokens to decode.
      input_length: the most tokens of an input. Input and answer must fit into
        the network's context.
      device_bytes: the most bytes of subsets on the device.
      mix_up_to: the largest share of the parameters that a subset may have to
        be mixed with others.
      max_batch: the most rows in a batch.

    Raises:
      UserError: an argument is out of range, the network's layers are stacked,
        or `corrections.check` refuses the network.
    """
    check_positive('max_decode_length', max_decode_length)
    check_positive('max_batch', max_batch)
    if network.scan_layers:
      raise UserError('serving needs a network with scan_layers = False')
    self.max_decode_length = max_decode_length
    self.input_length = input_length
    self.placed: cachetools.LRUCache[Hashable, on_device.Placed] = (
      cachetools.LRUCache(device_bytes, lambda placed: placed.nbytes)
    )
    self.counts = dict.fromkeys(
      ('swaps', 'device_hits', 'device_misses', 'restored'), 0
    )
    self.network = network
    self._load_seed = load_seed
    self.max_batch = max_batch
    self._applied: on_device.Placed | None = None
    self._nothing: dict[int, on_device.Placed] = {}
    self._params: PyTree | None = self._to_device()
    longest = batches.LEAST_LENGTH if input_length is None else input_length
    corrections.check(network, self._params, longest, max_decode_length)
    self.layout = on_device.Layout(self._params, fingerprint)
    self.most_mixed = int(mix_up_to * self.layout.size)
    self._checksum = np.asarray(integrity.checksum(self._params))
    self._slots = functools.lru_cache(maxsize=32)(slots_lib.slots_of)

  def decode(
    self, rows: Sequence[Row], decoder: Decoder = GREEDY
  ) -> list[Answer]:
    """Returns each row's answer, as if the row were decoded alone.

    After a failure, the parameters equal the seed, or the seed with the last
    applied subset.

    Args:
      rows: any number; they are decoded in batches of at most `max_batch`.
      decoder: greedy, beam search or `SAMPLING`.

    Raises:
      UserError: a subset does not belong to this seed.
    """
    with self.repairing():
      answers: dict[int, Answer] = {}
      placed = self._place_all(rows)
      for group in self._groups(rows, placed):
        for some in _chunks(group, self.max_batch):
          found = self._decode(
            [rows[i] for i in some], [placed[i] for i in some], decoder
          )
          answers |= dict(zip(some, found, strict=True))
    return [answers[i] for i in range(len(rows))]

  def warm_up(self, rows: Sequence[Row], decoder: Decoder = GREEDY) -> None:
    """Compiles the functions for batches of rows like these, of all sizes.

    Args:
      rows: examples of the lengths and of the capacity classes to expect.
      decoder: greedy, beam search or `SAMPLING`.
    """
    self.warm_up_swaps(rows)
    size = 1
    while size <= self.max_batch:
      for row in rows:
        self.decode([row] * size, decoder)
      if size > 1:
        self.decode([rows[i % len(rows)] for i in range(size)], decoder)
      size *= 2

  def warm_up_swaps(self, rows: Sequence[Row]) -> None:
    """Compiles what swaps subsets of the classes of these rows."""
    with self.repairing():
      for placed in self._place_all(rows):
        if placed is not None:
          other = self._none(placed.capacity)._replace(slack=placed.slack)
          self.apply(other)
          self.apply(placed)

  def prompt_size(self, row: Row) -> int:
    """Returns the number of tokens of a row's prompt."""
    prompt = np.asarray(self.network.prompt_of_inputs(row.tokens))
    return int(np.sum(prompt != self.network.pad_id))

  def mixes(self, placed: on_device.Placed | None) -> bool:
    """Returns whether a subset can be in one batch with others."""
    return placed is None or (
      placed.rounds == 1 and placed.size <= self.most_mixed
    )

  def revert(self) -> PyTree:
    """Removes the applied subset; returns the seed's parameters on the device.

    The arrays belong to the model: the next method call may donate them.
    """
    with self.repairing():
      return self.apply(None)

  def is_intact(self) -> bool:
    """Returns whether the parameters without a subset equal the seed's bits."""
    with self.repairing():
      found = integrity.checksum(self.apply(None))
    return bool(np.array_equal(np.asarray(found), self._checksum))

  def _groups(
    self, rows: Sequence[Row], placed: Sequence[on_device.Placed | None]
  ) -> list[list[int]]:
    """Returns lists of indices of the rows to decode together."""
    groups: dict[Hashable, list[int]] = {}
    for i, (row, subset) in enumerate(zip(rows, placed, strict=True)):
      if subset is not None:
        key: Hashable = ('alone', row.subset)
        if self.mixes(subset):
          key = subset.capacity
        groups.setdefault(key, []).append(i)
    plain = [i for i, subset in enumerate(placed) if subset is None]
    for key, group in groups.items():
      # Rows without a subset join the first group that is mixed.
      if plain and isinstance(key, int):
        group += plain
        plain = []
    return [*groups.values(), *([plain] if plain else [])]

  def _decode(
    self,
    rows: Sequence[Row],
    placed: list[on_device.Placed | None],
    decoder: Decoder,
  ) -> Iterator[Answer]:
    """Yields the answers of one batch's rows.

    Args:
      rows: the rows of the batch.
      placed: the subset of each row.
      decoder: greedy, beam search or `SAMPLING`.
    """
    how = batches.How(self.network, decoder, self.max_decode_length)
    draws = None
    if isinstance(decoder, decoding.Sampling):
      draws = [
        row.sampling.draws(np.array([row.number], np.int32)) for row in rows
      ]
    inputs = [row.tokens for row in rows]
    batch = batches.make(self.network, inputs, draws, self.input_length)
    if all(subset is placed[0] for subset in placed):
      found = batches.decode_alone(self.apply(placed[0]), batch, how=how)
    else:
      filled = [*placed, *[None] * (len(batch.prompts) - len(placed))]
      mixture = self.mixture(filled)
      found = batches.decode_mixed(
        self.apply(None),
        mixture.arrays,
        mixture.slots,
        batch,
        how=how,
        rooms=mixture.rooms,
        tensors=self.layout.tensors,
      )
    tokens, scores = (np.asarray(x)[: len(rows)] for x in found)
    for decoded, score in zip(
      decoding.continuations(self.network, tokens), scores, strict=True
    ):
      yield Answer(decoded, float(score))

  def mixture(self, placed: Sequence[on_device.Placed | None]) -> Mixture:
    """Returns what decodes each row with its own subset.

    Args:
      placed: each row's subset, which `mixes`; None for the seed.
    """
    capacity = max(
      (subset.capacity for subset in placed if subset is not None),
      default=on_device.capacity_class(0),
    )
    nothing = self._none(capacity)
    of_rows = [subset or nothing for subset in placed]
    slack = max(subset.slack for subset in of_rows)
    rooms = self.layout.rooms(capacity, slack)
    arrays = tuple(_widened(subset.arrays, capacity) for subset in of_rows)
    return Mixture(arrays, self._slots(rooms), rooms)

  def _place_all(self, rows: Sequence[Row]) -> list[on_device.Placed | None]:
    """Returns each row's subset on the device; None for the seed."""
    found: dict[Hashable, on_device.Placed | None] = {}
    for row in rows:
      if row.subset not in found:
        found[row.subset] = self.place(row)
    return [found[row.subset] for row in rows]

  def place(self, row: Row) -> on_device.Placed | None:
    """Returns a row's subset on the device; None for the seed.

    Raises:
      UserError: the subset does not belong to this seed, or is not finite.
    """
    if row.subset is None:
      return None
    if (found := self.placed.get(row.subset)) is not None:
      self.counts['device_hits'] += 1
      return found
    self.counts['device_misses'] += 1
    if row.load is None:
      raise UserError(f'subset {row.subset!r} is not on the device')
    subset = row.load()
    extraction.check_finite(subset)
    placed = self.layout.place(subset, self.apply(None))
    if placed.nbytes <= self.placed.maxsize:
      self.placed[row.subset] = placed
    return placed

  def _none(self, capacity: int) -> on_device.Placed:
    """Returns an empty subset of a capacity class."""
    if capacity not in self._nothing:
      self._nothing[capacity] = self.layout.empty(capacity)
    return self._nothing[capacity]

  def apply(self, placed: on_device.Placed | None) -> PyTree:
    """Returns the parameters with a subset, or the seed's for None.

    The arrays belong to the model: the next call may donate them.
    """
    if self._params is None:
      self._restore()
    if placed is not self._applied:
      self._swap(self._applied, placed)
    return self._params

  def _swap(
    self, old: on_device.Placed | None, placed: on_device.Placed | None
  ) -> None:
    """Applies a subset to the parameters in place of the old one."""
    if old is not None and placed is not None:
      self._params = self.layout.swap(self._params, old, placed)
      self._applied = placed
    elif old is not None:
      self._params = self.layout.write(self._params, old, tuned=False)
      self._applied = None
    elif placed is not None:
      # Set first: a write that fails halfway is undone like a complete one.
      self._applied = placed
      self._params = self.layout.write(self._params, placed, tuned=True)
    self.counts['swaps'] += placed is not None

  @contextlib.contextmanager
  def repairing(self) -> Iterator[None]:
    """Restores the seed's parameters if the block fails."""
    try:
      yield
    except UserError:
      raise  # Raised before anything was written.
    except BaseException:
      self._repair()
      raise

  def _repair(self) -> None:
    try:
      params = self.apply(None)
      if np.array_equal(integrity.checksum(params), self._checksum):
        return
    except Exception as e:
      logging.warning('The seed is loaded anew: %s', e)
    self._params, self._applied = None, None
    self.placed.clear()
    self._nothing.clear()
    try:
      self._restore()
    except Exception as e:
      logging.error('The seed cannot be loaded, it is tried again: %s', e)

  def _restore(self) -> None:
    params = self._to_device()
    if not np.array_equal(integrity.checksum(params), self._checksum):
      raise UserError('the seed is no longer what it was when serving began')
    self._params = params
    self.counts['restored'] += 1

  def _to_device(self) -> PyTree:
    # Committed to the device, like the results of later writes: functions
    # compiled for the one then serve the other.
    return jax.device_put(_copied(self._load_seed()), jax.devices()[0])


@functools.partial(jax.jit, static_argnums=1)
def _padded(arrays: on_device.Arrays, capacity: int) -> on_device.Arrays:
  more = capacity - len(arrays.positions)
  positions, values, seeds = (jnp.pad(x, (0, more)) for x in arrays[:3])
  return on_device.Arrays(positions, values, seeds, arrays.starts)


def _widened(arrays: on_device.Arrays, capacity: int) -> on_device.Arrays:
  """Returns a subset with the vectors of a larger class."""
  return (
    arrays if len(arrays.positions) == capacity else _padded(arrays, capacity)
  )


@jax.jit
def _copied(params: PyTree) -> PyTree:
  """Returns a copy on the device: XLA:CPU may share memory with the host."""
  return jax.tree.map(jnp.copy, params)


def _chunks(items: list[int], size: int) -> Iterator[list[int]]:
  for start in range(0, len(items), size):
    yield items[start : start + size]
