"""Rows that are decoded together, a token at a time.

A row joins between two steps: its prompt is read into a free slot of the cache.
It leaves in the same way. What a row's tokens are does not depend on the other
rows, as in whole batches; see `model`.
"""

from collections.abc import Iterator, Sequence
import contextlib
from typing import Any, NamedTuple

import jax
import numpy as np

from dst_t5x.models import decoding
from dst_t5x.models import sampling
from dst_t5x.serving import batches
from dst_t5x.serving import corrections
from dst_t5x.serving import model as model_lib
from dst_t5x.serving import steps
from dst_t5x.subsets import on_device

PyTree = Any


class Ask(NamedTuple):
  """A row to decode.

  Attributes:
    row: the input and its subset.
    decoder: `model.GREEDY` or `model.SAMPLING`.
    alternatives: whether the most probable tokens of each step are wanted.
  """

  row: model_lib.Row
  decoder: model_lib.Decoder = model_lib.GREEDY
  alternatives: bool = False


class Token(NamedTuple):
  """A decoded token.

  Attributes:
    id: of the token.
    logprob: its log-probability; not finite if the logits were not.
    alternatives: the most probable tokens and their log-probabilities, best
      first; empty if they were not asked for.
  """

  id: int
  logprob: float
  alternatives: tuple[tuple[int, float], ...] = ()


class _Slot(NamedTuple):
  """A row in its slot.

  Attributes:
    key: of its subset; None for the seed.
    placed: its subset on the device.
    read: what the next step reads, each `[1]`.
  """

  key: Any
  placed: on_device.Placed | None
  read: steps.Rows


class Running:
  """The rows that are being decoded with a model.

  Not thread-safe. After a failure it has no rows any more.
  """

  def __init__(self, model: model_lib.MultiSubsetModel, count: int) -> None:
    """Takes a model that `make` has checked; allocates nothing yet.

    Args:
      model: the model; its other methods can be used between two calls.
      count: the most rows.
    """
    self.count = count
    self._model = model
    self._length = _length(model)
    self._slots: dict[int, _Slot] = {}
    self._cache: PyTree | None = None
    self._own: dict[int, tuple[corrections.Own, on_device.Rooms]] = {}

  def __len__(self) -> int:
    return len(self._slots)

  def join(self, asks: Sequence[Ask]) -> list[int | None]:
    """Reads the prompts of rows, which have at least one token.

    Args:
      asks: the rows.

    Returns:
      Each row's slot; None if the row cannot be decoded together with those
      before it, or if there is no room.

    Raises:
      UserError: a subset cannot be used; see `model.MultiSubsetModel.place`.
        The rows that were running go on.
    """
    with self._model.repairing():
      placed = [self._place(ask.row) for ask in asks]
    slots: list[int | None] = []
    free = [i for i in range(self.count) if i not in self._slots]
    for ask, subset in zip(asks, placed, strict=True):
      fits = bool(free) and self._fits(ask.row.subset, subset)
      slots.append(free.pop(0) if fits else None)
      if (slot := slots[-1]) is not None:
        self._slots[slot] = self._begun(ask, subset)
    joined = [
      (slot, ask) for slot, ask in zip(slots, asks, strict=True)
      if slot is not None
    ]  # fmt: skip
    if joined:
      with self._failing():
        self._fill(*zip(*joined, strict=True))
    return slots

  def step(self) -> dict[int, Token]:
    """Returns the next token of each row by its slot."""
    with self._failing():
      size = _power_of_two(max(self._slots) + 1, self.count)
      in_order = [self._slots.get(i) for i in range(size)]
      any_row = next(iter(self._slots.values()))
      rows = jax.tree.map(
        lambda *x: np.concatenate(x),
        *((slot or any_row).read for slot in in_order),
      )
      params, own, rooms = self._parameters(in_order)
      how = self._how(rooms)
      chosen, self._cache = steps.step(params, own, self._cache, rows, how=how)
      return self._advanced(jax.device_get(chosen))

  def leave(self, slot: int) -> None:
    """Frees a slot."""
    del self._slots[slot]

  def clear(self) -> None:
    """Frees all slots, and the cache."""
    self._slots.clear()
    self._own.clear()
    self._cache = None

  def _place(self, row: model_lib.Row) -> on_device.Placed | None:
    # The cache of subsets may have dropped one that a row here still uses.
    for slot in self._slots.values():
      if slot.key == row.subset:
        return slot.placed
    return self._model.place(row)

  def _fits(self, key: Any, placed: on_device.Placed | None) -> bool:
    """Returns whether a subset can join those of the rows."""
    others = [slot for slot in self._slots.values() if slot.key != key]
    return not others or all(
      self._model.mixes(subset)
      for subset in (placed, *(slot.placed for slot in others))
    )

  def _begun(self, ask: Ask, placed: on_device.Placed | None) -> _Slot:
    row = ask.row
    prompt = np.asarray(self._model.network.prompt_of_inputs(row.tokens))
    prompt = prompt[prompt != self._model.network.pad_id]
    is_greedy = not isinstance(ask.decoder, decoding.Sampling)
    read = steps.Rows(
      tokens=prompt[-1:],
      positions=np.array([len(prompt) - 1], np.int32),
      steps=np.zeros(1, np.int32),
      greedy=np.array([is_greedy]),
      alternatives=np.array([ask.alternatives]),
      draws=_draws(row),
    )
    return _Slot(row.subset, placed, read)

  def _fill(self, slots: Sequence[int], asks: Sequence[Ask]) -> None:
    """Reads the prompts of rows into their slots."""
    model, how = self._model, self._how(None)
    batch = batches.make(
      model.network, [ask.row.tokens for ask in asks], None, model.input_length
    )
    size = len(batch.prompts)
    self._own.clear()
    params, own, rooms = self._parameters(
      [self._slots[slot] for slot in slots] + [None] * (size - len(slots)),
      keep=False,
    )
    if self._cache is None:
      self._cache = steps.blank(params, how=how, count=self.count)
    nowhere = [self.count] * (size - len(slots))
    places = np.array([*slots, *nowhere], np.int32)
    self._cache = steps.fill(
      params, own, self._cache, places, batch.prompts, how=self._how(rooms)
    )

  def _parameters(
    self, rows: Sequence[_Slot | None], keep: bool = True
  ) -> tuple[PyTree, corrections.Own | None, on_device.Rooms | None]:
    """Returns parameters, and what rows have of their own if subsets differ.

    Args:
      rows: in order; None for one that is not decoded.
      keep: whether the next calls are for the same rows, until one joins.
    """
    slots = list(self._slots.values())
    if all(slot.key == slots[0].key for slot in slots):
      return self._model.apply(slots[0].placed), None, None
    params = self._model.apply(None)
    if (found := self._own.get(len(rows))) is None:
      mixture = self._model.mixture([slot and slot.placed for slot in rows])
      how = self._how(mixture.rooms)
      own = steps.own(params, mixture.arrays, mixture.slots, how=how)
      found = own, mixture.rooms
      if keep:
        self._own = {len(rows): found}
    return params, *found

  def _how(self, rooms: on_device.Rooms | None) -> steps.How:
    tensors = self._model.layout.tensors
    return steps.How(self._model.network, self._length, tensors, rooms)

  def _advanced(self, chosen: steps.Chosen) -> dict[int, Token]:
    """Notes the tokens that the next step reads, and returns them."""
    found = {}
    for i, slot in self._slots.items():
      read, token = slot.read, chosen.tokens[i : i + 1]
      read = read._replace(
        tokens=token, positions=read.positions + 1, steps=read.steps + 1
      )
      self._slots[i] = slot._replace(read=read)
      best: tuple[tuple[int, float], ...] = ()
      if read.alternatives[0]:
        pairs = zip(chosen.best[i], chosen.best_logprobs[i], strict=True)
        best = tuple((int(number), float(x)) for number, x in pairs)
      found[i] = Token(int(token[0]), float(chosen.logprobs[i]), best)
    return found

  @contextlib.contextmanager
  def _failing(self) -> Iterator[None]:
    """Frees everything if the block fails: the cache may have been lost."""
    try:
      with self._model.repairing():
        yield
    except BaseException:
      self.clear()
      raise

  def warm_up(self, rows: Sequence[model_lib.Row]) -> None:
    """Compiles what rows like these need, alone and together.

    Args:
      rows: examples of the lengths and of the capacity classes to expect.
    """
    self._model.warm_up_swaps(rows)
    size = 1
    while size <= self.count:
      self._try([[rows[0]] * size])
      self._try([[rows[i % len(rows)] for i in range(size)]])
      # One row joins others.
      self._try([[rows[0]] * (size - 1), [rows[-1]]])
      size = self.count if size < self.count < 2 * size else 2 * size

  def _try(self, joining: Sequence[Sequence[model_lib.Row]]) -> None:
    """Decodes a token of rows that join one after the other."""
    for rows in joining:
      self.join([Ask(row) for row in rows])
    self.step()
    self._slots.clear()


def make(model: model_lib.MultiSubsetModel, count: int) -> Running | None:
  """Returns an empty batch; None if the model's rows cannot join one.

  Args:
    model: the model.
    count: the most rows.
  """
  if model.input_length is None:
    return None
  has_slots = model.network.slots(None, _length(model)) is not None
  return Running(model, count) if has_slots else None


def _length(model: model_lib.MultiSubsetModel) -> int:
  """Returns the most tokens of a row."""
  inputs = model.input_length or 0
  prompt = corrections.prompt_length(model.network, inputs)
  return prompt + model.max_decode_length


def _draws(row: model_lib.Row) -> sampling.Draws:
  return row.sampling.draws(np.array([row.number], np.int32))


def _power_of_two(least: int, most: int) -> int:
  return min(1 << (least - 1).bit_length(), most)
