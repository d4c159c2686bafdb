"""Greedy decoding, sampling and beam search.

All read the prompts once and stop as soon as no example can change any more.
They are pure functions of the parameters and the prompts, to be jitted with the
network and the lengths as static arguments.
"""

from collections.abc import Callable
import dataclasses
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from dst_t5x.core import values
from dst_t5x.core.errors import UserError
from dst_t5x.models import api
from dst_t5x.models import beams
from dst_t5x.models import sampling

Array = jax.Array
PyTree = Any

# Stands for minus infinity, but survives being divided and added to.
_NEVER = -1e7


@dataclasses.dataclass(frozen=True)
class GreedyDecoder:
  """Takes the most probable token at every step."""

  def __call__(
    self,
    network: api.Network,
    params: PyTree,
    prompts: Array,
    max_decode_length: int,
    eos_id: int | None = None,
    numbers: Array | None = None,
  ) -> tuple[Array, Array]:
    """Decodes a batch.

    Args:
      network: the network.
      params: its parameters.
      prompts: int32 `[batch, length]`, filled up with the network's `pad_id`
        at the end. A prompt of nothing else is not continued.
      max_decode_length: number of tokens after which decoding ends.
      eos_id: the token that ends a sequence; the network's by default.
      numbers: int32 `[batch]`, of the examples in their file; see `Sampling`.

    Returns:
      Tokens, int32 `[batch, max_decode_length]`, filled up with `pad_id` behind
      the end token; and scores, float32 `[batch]`, the log-probability of the
      tokens.
    """
    del numbers

    def most_probable(logits: Array, step: Array) -> Array:
      del step
      return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    return _one_by_one(
      network, params, prompts, max_decode_length, eos_id, most_probable
    )


@dataclasses.dataclass(frozen=True)
class Sampling:
  """Draws every token at random; see `sampling` for the filters.

  Equal random seeds give an example the same tokens, whatever the batch that it
  is in, as far as its logits are the same. Examples with equal prompts and
  different numbers get different ones.

  Attributes:
    temperature: logits are divided by it. It is above 0: the limit 0 is
      `GreedyDecoder`.
    top_k: how many of the most probable tokens are kept; None for all.
    top_p: the most probable tokens that together have this probability are
      kept.
    random_seed: what is random follows from it, and from an example's number.
  """

  temperature: values.NotNegative = 1.0
  top_k: values.Positive | None = None
  top_p: values.Share = 1.0
  random_seed: values.RandomSeed = 0

  def __post_init__(self) -> None:
    values.check_fields(self)
    # The network computes in float32, where it must be above 0, too.
    if not np.float32(self.temperature) > 0:
      raise UserError(
        f'Sampling.temperature must be above 0, it is {self.temperature!r}: for'
        ' the most probable tokens, set DECODER = @decoding.GreedyDecoder()'
      )

  def draws(self, numbers: sampling.Numbers) -> sampling.Draws:
    """Returns these settings for examples of these numbers, `[batch]`."""

    def each(value: Any, dtype: Any) -> np.ndarray:
      return np.full(numbers.shape, value, dtype)

    top_k = sampling.ALL if self.top_k is None else self.top_k
    return sampling.Draws(
      each(self.random_seed, np.int32),
      numbers,
      each(self.temperature, np.float32),
      each(min(top_k, sampling.ALL), np.int32),
      each(self.top_p, np.float32),
    )

  def __call__(
    self,
    network: api.Network,
    params: PyTree,
    prompts: Array,
    max_decode_length: int,
    eos_id: int | None = None,
    numbers: Array | None = None,
    draws: sampling.Draws | None = None,
  ) -> tuple[Array, Array]:
    """Decodes a batch; the other arguments as `GreedyDecoder`.

    Args:
      network: the network.
      params: its parameters.
      prompts: int32 `[batch, length]`.
      max_decode_length: number of tokens after which decoding ends.
      eos_id: the token that ends a sequence.
      numbers: int32 `[batch]`, of the examples in their file, split or request;
        their rows by default.
      draws: settings of each example, instead of the fields and `numbers`.

    Returns:
      As `GreedyDecoder`. Scores are of the network's own probabilities, without
      temperature and filters.
    """
    if numbers is None:
      numbers = jnp.arange(len(prompts))
    draws = draws or self.draws(numbers)
    keys = sampling.keys(draws)

    def drawn(logits: Array, step: Array) -> Array:
      return sampling.draw(logits, draws, keys, step)

    return _one_by_one(
      network, params, prompts, max_decode_length, eos_id, drawn
    )


class _State(NamedTuple):
  """Arrays of `[batch]`, or `[batch, max_decode_length]` for all tokens."""

  step: Array
  last: Array
  done: Array
  scores: Array
  tokens: Array
  cache: PyTree


def _one_by_one(
  network: api.Network,
  params: PyTree,
  prompts: Array,
  max_decode_length: int,
  eos_id: int | None,
  choose: Callable[[Array, Array], Array],
) -> tuple[Array, Array]:
  """Adds one token after the other; the rest is as of `GreedyDecoder`.

  Args:
    network: the network.
    params: its parameters.
    prompts: int32 `[batch, length]`.
    max_decode_length: number of tokens after which decoding ends.
    eos_id: the token that ends a sequence.
    choose: maps logits `[batch, vocab]` and the number of the step to tokens,
      int32 `[batch]`.
  """
  batch = prompts.shape[0]
  start = network.start_decoding(params, prompts, 1, max_decode_length)
  eos_id = network.eos_id if eos_id is None else eos_id

  def unfinished(state: _State) -> Array:
    return (state.step < max_decode_length) & ~jnp.all(state.done)

  def advance(state: _State) -> _State:
    logits, cache = start.step(state.last, state.cache)
    token = choose(logits, state.step)
    gain = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
    gain -= jax.nn.logsumexp(logits, axis=-1)
    written = jnp.where(state.done, network.pad_id, token)
    return _State(
      step=state.step + 1,
      last=jnp.where(state.done, 0, token),
      done=state.done | (token == eos_id),
      scores=state.scores + jnp.where(state.done, 0.0, gain),
      tokens=state.tokens.at[:, state.step].set(written),
      cache=cache,
    )

  state = _State(
    step=jnp.int32(0),
    last=start.first,
    done=api.is_empty(network, prompts),
    scores=jnp.zeros(batch),
    tokens=jnp.full((batch, max_decode_length), network.pad_id, jnp.int32),
    cache=start.cache,
  )
  final = lax.while_loop(unfinished, advance, state)
  return final.tokens, final.scores


def continuations(network: api.Network, tokens: np.ndarray) -> list[np.ndarray]:
  """Returns what was decoded, each int32 `[length]`, without what fills it up.

  Args:
    network: the network.
    tokens: int32 `[batch, max_decode_length]`, of a decoder.
  """
  is_token = tokens != network.pad_id
  places = np.arange(1, tokens.shape[-1] + 1)
  lengths = np.max(is_token * places, axis=-1, initial=0)
  return [row[:length] for row, length in zip(tokens, lengths, strict=True)]


class _BeamState(NamedTuple):
  """Live and finished hypotheses, best first: `[batch, beams]` and tokens."""

  step: Array
  live_scores: Array  # Log-probabilities.
  live_tokens: Array
  finished_scores: Array  # Log-probabilities over the brevity penalty.
  finished_tokens: Array
  is_finished: Array  # Which of the places for finished ones are taken.
  cache: PyTree


@dataclasses.dataclass(frozen=True)
class BeamSearch:
  """Beam search with the brevity penalty of T5X (Wu et al. 2016, eq. 14).

  A finished hypothesis scores its log-probability over `((5 + n) / 6)^alpha`, n
  its number of tokens with the end token. The search of an example ends when
  all its beams have finished and no live hypothesis could do better than the
  worst of them, were it to grow to the maximal length at no cost.

  Attributes:
    num_beams: number of live and of finished hypotheses kept.
    alpha: strength of the penalty, at least 0; 0 favours short sequences.
  """

  num_beams: values.Positive = 4
  alpha: values.NotNegative = 0.6

  def __post_init__(self) -> None:
    values.check_fields(self)

  def __call__(
    self,
    network: api.Network,
    params: PyTree,
    prompts: Array,
    max_decode_length: int,
    eos_id: int | None = None,
    numbers: Array | None = None,
  ) -> tuple[Array, Array]:
    """Decodes a batch; arguments as `GreedyDecoder`.

    Returns:
      The best finished hypothesis of each example, int32 `[batch,
      max_decode_length]`, filled up with `pad_id` behind the end token; and its
      score, float32 `[batch]`. Where none has finished, the best live one and
      its log-probability.
    """
    del numbers
    start = network.start_decoding(
      params, prompts, self.num_beams, max_decode_length
    )
    empty = api.is_empty(network, prompts)
    eos_id = network.eos_id if eos_id is None else eos_id

    def unfinished(state: _BeamState) -> Array:
      settled = empty | self._is_settled(state, max_decode_length)
      return (state.step < max_decode_length) & ~jnp.all(settled)

    def advance(state: _BeamState) -> _BeamState:
      return self._advance(state, start, eos_id)

    nothing = jnp.full(
      (len(prompts), self.num_beams, max_decode_length),
      network.pad_id,
      jnp.int32,
    )
    final = lax.while_loop(
      unfinished, advance, self._start(nothing, start.cache)
    )
    any_finished = jnp.any(final.is_finished, axis=1)
    tokens = jnp.where(
      any_finished[:, None],
      final.finished_tokens[:, 0],
      final.live_tokens[:, 0],
    )
    scores = jnp.where(
      any_finished, final.finished_scores[:, 0], final.live_scores[:, 0]
    )
    tokens = jnp.where(empty[:, None], network.pad_id, tokens)
    return tokens, jnp.where(empty, 0.0, scores)

  def _start(self, nothing: Array, cache: PyTree) -> _BeamState:
    never = jnp.full(nothing.shape[:2], _NEVER)
    return _BeamState(
      step=jnp.int32(0),
      # Only one beam is live at first: the others would be copies of it.
      live_scores=never.at[:, 0].set(0.0),
      live_tokens=nothing,
      finished_scores=never,
      finished_tokens=nothing,
      is_finished=jnp.zeros(nothing.shape[:2], bool),
      cache=cache,
    )

  def _penalty(self, length: Array | int) -> Array:
    return ((5.0 + jnp.asarray(length, jnp.float32)) / 6.0) ** self.alpha

  def _is_settled(self, state: _BeamState, max_length: int) -> Array:
    """Returns bool `[batch]`: the finished hypotheses can change no more."""
    best_possible = state.live_scores[:, 0] / self._penalty(max_length)
    worst_finished = jnp.min(state.finished_scores, axis=1)
    return jnp.all(state.is_finished, axis=1) & (worst_finished > best_possible)

  def _advance(
    self, state: _BeamState, start: api.DecodingStart, eos_id: int
  ) -> _BeamState:
    """Adds one token to every live hypothesis."""
    previous = state.live_tokens[:, :, state.step - 1].reshape(-1)
    previous = jnp.where(state.step == 0, start.first, previous)
    logits, cache = start.step(previous, state.cache)
    # Twice as many as there are beams: half of them may end here.
    scores, parents, tokens = beams.best_continuations(
      logits, state.live_scores, 2 * self.num_beams
    )
    candidates = beams.choose(state.live_tokens, parents)
    candidates = candidates.at[:, :, state.step].set(tokens)
    ends = tokens == eos_id

    live_scores, live = lax.top_k(
      jnp.where(ends, _NEVER, scores), self.num_beams
    )
    normalised = scores / self._penalty(state.step + 1)
    finished_scores, finished = lax.top_k(
      jnp.concatenate(
        [state.finished_scores, jnp.where(ends, normalised, _NEVER)], axis=1
      ),
      self.num_beams,
    )
    return _BeamState(
      step=state.step + 1,
      live_scores=live_scores,
      live_tokens=beams.choose(candidates, live),
      finished_scores=finished_scores,
      finished_tokens=beams.choose(
        jnp.concatenate([state.finished_tokens, candidates], axis=1),
        finished,
      ),
      is_finished=beams.choose(
        jnp.concatenate([state.is_finished, ends], axis=1), finished
      ),
      cache=beams.choose_rows(
        cache, beams.choose(parents, live), start.batch_axis
      ),
    )
