"""One seed on the device, many subsets: each row decoded with its own."""

from collections.abc import Callable, Hashable, Iterator, Sequence
import contextlib
import functools
from typing import Any, NamedTuple

from absl import logging
import cachetools
from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dst_t5x import subsets as subset_lib
from dst_t5x.core.errors import UserError, check_positive
from dst_t5x.models import api
from dst_t5x.models import decoding
from dst_t5x.serving import corrections
from dst_t5x.serving import integrity
from dst_t5x.serving import slots as slots_lib
from dst_t5x.subsets import extraction
from dst_t5x.subsets import on_device

PyTree = Any
Decoder = decoding.GreedyDecoder | decoding.BeamSearch

GREEDY = decoding.GreedyDecoder()
LEAST_LENGTH = 16
# A subset of a larger share of the parameters is not mixed with others: then
# one batch after the other is faster, see benchmarks/README.md.
MIX_UP_TO = 1e-3


class Row(NamedTuple):
  """One input to decode.

  Attributes:
    tokens: int32 [length], with the end token.
    subset: None, or what its cache knows it by.
    load: returns the subset, if it is not on the device.
  """

  tokens: np.ndarray
  subset: Hashable | None = None
  load: Callable[[], subset_lib.Subset] | None = None


class Answer(NamedTuple):
  """What was decoded.

  Attributes:
    tokens: int32 [max_decode_length], 0 after the end token.
    score: see the decoders; not finite where the logits were not.
  """

  tokens: np.ndarray
  score: float


class MultiSubsetModel:
  """Decodes with any subset of one seed.

  Not for several threads at once: give it one.

  Attributes:
    layout: of the seed.
    max_decode_length: tokens that are decoded at most.
    placed: the subsets on the device, by what they are known by, up to some
      bytes; the one not used for longest goes first.
    max_batch: rows that are decoded at once.
    most_mixed: entries that a subset may have to be mixed with others.
    counts: how often what happened: `swaps`, `device_hits`, `device_misses`,
      `restored`.
  """

  def __init__(
    self,
    network: api.Network,
    load_seed: Callable[[], PyTree],
    fingerprint: str,
    *,
    max_decode_length: int,
    device_bytes: int = 2**30,
    mix_up_to: float = MIX_UP_TO,
    max_batch: int = 16,
  ) -> None:
    """Puts the seed on the device.

    Args:
      network: the model, whose layers are not stacked.
      load_seed: returns the seed, unstacked, on the host; called again if the
        parameters on the device were lost or spoilt by a failure.
      fingerprint: the seed's.
      max_decode_length: tokens that are decoded at most.
      device_bytes: of the subsets on the device.
      mix_up_to: largest share of the parameters that a subset may have to be
        decoded in one batch with others.
      max_batch: rows that are decoded at once.

    Raises:
      UserError: the seed cannot be served so.
    """
    check_positive('max_decode_length', max_decode_length)
    check_positive('max_batch', max_batch)
    if network.scan_layers:
      raise UserError('serving wants a network with scan_layers = False')
    self.max_decode_length = max_decode_length
    self.placed: cachetools.LRUCache[Hashable, on_device.Placed] = (
      cachetools.LRUCache(device_bytes, lambda placed: placed.nbytes)
    )
    self.counts = dict.fromkeys(
      ('swaps', 'device_hits', 'device_misses', 'restored'), 0
    )
    self._network = network
    self._load_seed = load_seed
    self.max_batch = max_batch
    self._applied: on_device.Placed | None = None
    self._nothing: dict[int, on_device.Placed] = {}
    self._params: PyTree | None = self._to_device()
    corrections.check(network, self._params)
    self.layout = on_device.Layout(self._params, fingerprint)
    self.most_mixed = int(mix_up_to * self.layout.size)
    self._checksum = np.asarray(integrity.checksum(self._params))
    self._slots = functools.lru_cache(maxsize=32)(slots_lib.slots_of)

  def decode(
    self, rows: Sequence[Row], decoder: Decoder = GREEDY
  ) -> list[Answer]:
    """Decodes each row with its subset, as if it were alone.

    Whatever goes wrong, the parameters are the seed's afterwards, or the
    subset's that was applied last, without a trace of another one.

    Args:
      rows: at most `max_batch` of one batch are decoded at once.
      decoder: greedy or beam search.

    Raises:
      UserError: a subset is not one of this seed.
    """
    with self._repairing():
      answers: dict[int, Answer] = {}
      placed = self._place_all(rows)
      for group in self._groups(rows, placed):
        for some in _chunks(group, self.max_batch):
          tokens = _batch(self._network, [rows[i].tokens for i in some])
          found = self._decode(tokens, [placed[i] for i in some], decoder)
          answers |= dict(zip(some, found, strict=False))
    return [answers[i] for i in range(len(rows))]

  def warm_up(self, rows: Sequence[Row], decoder: Decoder = GREEDY) -> None:
    """Compiles what batches of any size with rows like these will need.

    Args:
      rows: of the lengths and of the classes that there will be.
      decoder: greedy or beam search.
    """
    with self._repairing():
      for placed in self._place_all(rows):
        if placed is not None:
          # From any subset to another of the class.
          other = self._none(placed.capacity)._replace(slack=placed.slack)
          self._apply(other)
          self._apply(placed)
    size = 1
    while size <= self.max_batch:
      for row in rows:
        self.decode([row] * size, decoder)
      if size > 1:
        self.decode([rows[i % len(rows)] for i in range(size)], decoder)
      size *= 2

  def mixes(self, placed: on_device.Placed | None) -> bool:
    """Returns whether a subset may be in one batch with others."""
    return placed is None or (
      placed.rounds == 1 and placed.size <= self.most_mixed
    )

  def revert(self) -> PyTree:
    """Returns the parameters, on the device, after making them the seed's.

    They are the model's own: the next call of a method gives them away.
    """
    with self._repairing():
      return self._seed()

  def is_intact(self) -> bool:
    """Returns whether the parameters without a subset are the seed's bits."""
    with self._repairing():
      found = integrity.checksum(self._seed())
    return bool(np.array_equal(np.asarray(found), self._checksum))

  def _groups(
    self, rows: Sequence[Row], placed: Sequence[on_device.Placed | None]
  ) -> list[list[int]]:
    """Returns which rows are decoded together."""
    groups: dict[Hashable, list[int]] = {}
    for i, (row, its) in enumerate(zip(rows, placed, strict=True)):
      if its is not None:
        key: Hashable = ('alone', row.subset)
        if self.mixes(its):
          key = its.capacity
        groups.setdefault(key, []).append(i)
    plain = [i for i, its in enumerate(placed) if its is None]
    for key, group in groups.items():
      # The seed's own rows go with anything that is mixed.
      if plain and isinstance(key, int):
        group += plain
        plain = []
    return [*groups.values(), *([plain] if plain else [])]

  def _decode(
    self,
    tokens: np.ndarray,
    placed: list[on_device.Placed | None],
    decoder: Decoder,
  ) -> Iterator[Answer]:
    """Yields the answers of rows that may be together; then those of padding.

    Args:
      tokens: int32 [batch, length], as many as `placed` or more.
      placed: of the first rows.
      decoder: greedy or beam search.
    """
    how = _How(self._network, decoder, self.max_decode_length)
    if all(its is placed[0] for its in placed):
      self._apply(placed[0])
      found = _decode_alone(self._params, tokens, how=how)
    else:
      params = self._seed()
      capacity = max(its.capacity for its in placed if its is not None)
      nothing = self._none(capacity)
      all_rows = [its or nothing for its in placed]
      all_rows += [nothing] * (len(tokens) - len(placed))
      rooms = self.layout.rooms(capacity, max(its.slack for its in all_rows))
      found = _decode_mixed(
        params,
        tuple(its.arrays for its in all_rows),
        self._slots(rooms),
        tokens,
        how=how,
        rooms=rooms,
        tensors=self.layout.tensors,
      )
    for tokens_of, score in zip(*map(np.asarray, found), strict=True):
      yield Answer(tokens_of, float(score))

  def _place_all(self, rows: Sequence[Row]) -> list[on_device.Placed | None]:
    """Returns each row's subset on the device, None of the seed."""
    found: dict[Hashable, on_device.Placed | None] = {None: None}
    for row in rows:
      if row.subset not in found:
        found[row.subset] = self._place(row)
    return [found[row.subset] for row in rows]

  def _place(self, row: Row) -> on_device.Placed:
    if (found := self.placed.get(row.subset)) is not None:
      self.counts['device_hits'] += 1
      return found
    self.counts['device_misses'] += 1
    if row.load is None:
      raise UserError(f'subset {row.subset!r} is not on the device')
    subset = row.load()
    extraction.check_finite(subset)
    placed = self.layout.place(subset, self._seed())
    if placed.nbytes <= self.placed.maxsize:
      self.placed[row.subset] = placed
    return placed

  def _none(self, capacity: int) -> on_device.Placed:
    """Returns a subset of a class that has no entries."""
    if capacity not in self._nothing:
      self._nothing[capacity] = self.layout.empty(capacity)
    return self._nothing[capacity]

  def _seed(self) -> PyTree:
    """Returns the parameters, after making them the seed's."""
    self._apply(None)
    return self._params

  def _apply(self, placed: on_device.Placed | None) -> None:
    """Makes the parameters those of a subset."""
    if self._params is None:
      self._restore()
    old = self._applied
    if placed is old:
      return
    if old is not None and placed is not None:
      self._params = self.layout.swap(self._params, old, placed)
      self._applied = placed
    elif old is not None:
      self._params = self.layout.write(self._params, old, tuned=False)
      self._applied = None
    elif placed is not None:
      # Noted before: a write that fails halfway is undone like a whole one.
      self._applied = placed
      self._params = self.layout.write(self._params, placed, tuned=True)
    self.counts['swaps'] += placed is not None

  @contextlib.contextmanager
  def _repairing(self) -> Iterator[None]:
    """Makes the parameters the seed's, if what is done with them fails."""
    try:
      yield
    except UserError:
      raise  # Found before anything was written.
    except BaseException:
      self._repair()
      raise

  def _repair(self) -> None:
    try:
      params = self._seed()
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
    # Committed to its device, as all that is written later will be: else what
    # is compiled for the one would not do for the other.
    return jax.device_put(_copied(self._load_seed()), jax.devices()[0])


@jax.jit
def _copied(params: PyTree) -> PyTree:
  """Returns a copy on the device: XLA:CPU may share memory with the host's."""
  return jax.tree.map(jnp.copy, params)


class _How(NamedTuple):
  """The static arguments of a compiled function."""

  network: api.Network
  decoder: Decoder
  max_decode_length: int

  def __call__(self, params: PyTree, tokens: jax.Array) -> Any:
    return self.decoder(self.network, params, tokens, self.max_decode_length)


@functools.partial(jax.jit, static_argnames='how')
def _decode_alone(params: PyTree, tokens: jax.Array, how: _How) -> Any:
  """Decodes all rows with the parameters as they are."""
  return how(params, tokens)


@functools.partial(jax.jit, static_argnames=('how', 'rooms', 'tensors'))
def _decode_mixed(
  params: PyTree,
  arrays: tuple[on_device.Arrays, ...],
  slots: slots_lib.Slots,
  tokens: jax.Array,
  how: _How,
  rooms: on_device.Rooms,
  tensors: on_device.Tensors,
) -> Any:
  """Decodes each row with the seed's parameters and its own subset."""
  stacked = jax.tree.map(lambda *vectors: jnp.stack(vectors), *arrays)
  by_example = corrections.Corrections(
    how.network, tensors, params, stacked, rooms, slots
  )
  with nn.intercept_methods(by_example.intercept):
    return how(params, tokens)


def _chunks(items: list[int], size: int) -> Iterator[list[int]]:
  for start in range(0, len(items), size):
    yield items[start : start + size]


def _batch(network: api.Network, inputs: Sequence[np.ndarray]) -> np.ndarray:
  """Returns int32 [batch, length], both powers of two: few shapes compile."""
  rows = [network.prompt_of_inputs(tokens) for tokens in inputs]
  longest = max(len(row) for row in rows)
  length = max(LEAST_LENGTH, 1 << (longest - 1).bit_length())
  shape = 1 << (len(rows) - 1).bit_length(), length
  batch = np.full(shape, network.pad_id, np.int32)
  for i, row in enumerate(rows):
    batch[i, : len(row)] = row
  return batch
