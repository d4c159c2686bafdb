"""Compiled functions of rows that join and leave while others are decoded.

Compiled for each number of rows (a power of two), length of prompts and
capacity class of subsets; the cache is given away and comes back.
"""

from collections.abc import Iterator
import contextlib
import functools
from typing import Any, NamedTuple

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp

from dst_t5x.models import api
from dst_t5x.models import sampling
from dst_t5x.serving import corrections
from dst_t5x.serving import slots as slots_lib
from dst_t5x.subsets import on_device

Array = jax.Array
PyTree = Any

# Of each step; the most that OpenAI's interface can ask for.
ALTERNATIVES = 20


class How(NamedTuple):
  """The static arguments of a compiled function.

  Attributes:
    network: the network.
    length: tokens of a row at most.
    tensors: the seed's.
    rooms: of the rows' own subsets; None if the parameters have the subset.
  """

  network: api.Network
  length: int
  tensors: on_device.Tensors
  rooms: on_device.Rooms | None

  def slots(self, params: PyTree) -> api.Slots:
    """Returns the network's slots."""
    found = self.network.slots(params, self.length)
    assert found is not None  # `running.make` has asked.
    return found

  @contextlib.contextmanager
  def correcting(self, own: corrections.Own | None) -> Iterator[None]:
    """Makes the network decode each row with its own subset."""
    if own is None or self.rooms is None:
      yield
      return
    by_example = corrections.Corrections(
      self.network, self.tensors, self.rooms, own
    )
    with nn.intercept_methods(by_example.intercept):
      yield


class Rows(NamedTuple):
  """What a step reads, of each row; each field is `[rows]`.

  Attributes:
    tokens: int32, read in this step.
    positions: int32, of the tokens.
    steps: int32, numbers of the tokens that this step finds.
    greedy: bool, whether the most probable token is taken.
    alternatives: bool, whether the most probable tokens are wanted.
    draws: how tokens are drawn.
  """

  tokens: Any
  positions: Any
  steps: Any
  greedy: Any
  alternatives: Any
  draws: sampling.Draws


class Chosen(NamedTuple):
  """What a step finds.

  Attributes:
    tokens: int32 `[rows]`.
    logprobs: float32 `[rows]`, of the tokens.
    best: int32 `[rows, ALTERNATIVES]`, the most probable tokens; undefined if
      no row wants them. Fewer if the vocabulary has fewer.
    best_logprobs: float32, like `best`.
  """

  tokens: Array
  logprobs: Array
  best: Array
  best_logprobs: Array


@functools.partial(jax.jit, static_argnames=('how', 'count'))
def blank(params: PyTree, how: How, count: int) -> PyTree:
  """Returns the cache of `count` slots."""
  return how.slots(params).blank(count)


@functools.partial(jax.jit, static_argnames=('how',))
def own(
  params: PyTree,
  arrays: tuple[on_device.Arrays, ...],
  slots: slots_lib.Slots,
  how: How,
) -> corrections.Own:
  """Returns what the rows have of their own."""
  assert how.rooms is not None
  stacked = jax.tree.map(lambda *vectors: jnp.stack(vectors), *arrays)
  return corrections.own(how.tensors, params, stacked, how.rooms, slots)


@functools.partial(jax.jit, static_argnames=('how',), donate_argnames='cache')
def fill(
  params: PyTree,
  own: corrections.Own | None,
  cache: PyTree,
  slots: Array,
  prompts: Array,
  how: How,
) -> PyTree:
  """Returns the cache with prompts in the slots; see `api.Slots.fill`."""
  with how.correcting(own):
    return how.slots(params).fill(cache, slots, prompts)


@functools.partial(jax.jit, static_argnames=('how',), donate_argnames='cache')
def step(
  params: PyTree,
  own: corrections.Own | None,
  cache: PyTree,
  rows: Rows,
  how: How,
) -> tuple[Chosen, PyTree]:
  """Decodes a token of each row; the rows are in the first slots."""
  with how.correcting(own):
    logits, cache = how.slots(params).step(cache, rows.tokens, rows.positions)
  return _choose(logits, rows), cache


def _choose(logits: Array, rows: Rows) -> Chosen:
  """Returns the rows' tokens from logits `[rows, vocab]`."""
  greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)

  def draw(greedy: Array) -> Array:
    keys = sampling.keys(rows.draws)
    drawn = sampling.draw(logits, rows.draws, keys, rows.steps)
    return jnp.where(rows.greedy, greedy, drawn)

  tokens = lax.cond(jnp.all(rows.greedy), lambda x: x, draw, greedy)
  normalizer = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
  gains = jnp.take_along_axis(logits, tokens[:, None], axis=-1) - normalizer
  count = min(ALTERNATIVES, logits.shape[-1])
  best, which = lax.cond(
    jnp.any(rows.alternatives),
    lambda x: tuple(lax.top_k(x, count)),
    lambda x: (
      jnp.zeros((len(x), count), x.dtype),
      jnp.zeros((len(x), count), jnp.int32),
    ),
    logits,
  )
  return Chosen(tokens, gains[:, 0], which, best - normalizer)
