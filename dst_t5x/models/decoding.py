"""Greedy decoding and beam search.

Both read the prompts once and stop as soon as no example can change any more.
They are pure functions of the parameters and the prompts, to be jitted with the
network and the lengths as static arguments.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from dst_t5x.core import values
from dst_t5x.models import api

Array = jax.Array
PyTree = Any

# Stands for minus infinity, but survives being divided and added to.
_NEVER = -1e7


class _GreedyState(NamedTuple):
  """Arrays of `[batch]`, or `[batch, max_decode_length]` for all tokens."""

  step: Array
  last: Array
  done: Array
  scores: Array
  tokens: Array
  cache: PyTree


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
  ) -> tuple[Array, Array]:
    """Decodes a batch.

    Args:
      network: the network.
      params: its parameters.
      prompts: int32 `[batch, length]`, filled up with the network's `pad_id`
        at the end. A prompt of nothing else is not continued.
      max_decode_length: number of tokens after which decoding ends.
      eos_id: the token that ends a sequence; the network's by default.

    Returns:
      Tokens, int32 `[batch, max_decode_length]`, 0 after the end token; and
      scores, float32 `[batch]`, the log-probability of the tokens.
    """
    batch = prompts.shape[0]
    start = network.start_decoding(params, prompts, 1, max_decode_length)
    eos_id = network.eos_id if eos_id is None else eos_id

    def unfinished(state: _GreedyState) -> Array:
      return (state.step < max_decode_length) & ~jnp.all(state.done)

    def advance(state: _GreedyState) -> _GreedyState:
      logits, cache = start.step(state.last, state.cache)
      best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
      gain = jnp.max(logits, axis=-1) - jax.nn.logsumexp(logits, axis=-1)
      token = jnp.where(state.done, 0, best)
      return _GreedyState(
        step=state.step + 1,
        last=token,
        done=state.done | (token == eos_id),
        scores=state.scores + jnp.where(state.done, 0.0, gain),
        tokens=state.tokens.at[:, state.step].set(token),
        cache=cache,
      )

    state = _GreedyState(
      step=jnp.int32(0),
      last=start.first,
      done=api.is_empty(network, prompts),
      scores=jnp.zeros(batch),
      tokens=jnp.zeros((batch, max_decode_length), jnp.int32),
      cache=start.cache,
    )
    final = lax.while_loop(unfinished, advance, state)
    return final.tokens, final.scores


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
  ) -> tuple[Array, Array]:
    """Decodes a batch; arguments as `GreedyDecoder`.

    Returns:
      The best finished hypothesis of each example, int32 `[batch,
      max_decode_length]`, 0 after the end token; and its score, float32
      `[batch]`. Where none has finished, the best live one and its
      log-probability.
    """
    batch = prompts.shape[0]
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

    final = lax.while_loop(
      unfinished, advance, self._start(batch, max_decode_length, start.cache)
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
    return jnp.where(empty[:, None], 0, tokens), jnp.where(empty, 0.0, scores)

  def _start(self, batch: int, length: int, cache: PyTree) -> _BeamState:
    shape = (batch, self.num_beams)
    never = jnp.full(shape, _NEVER)
    nothing = jnp.zeros((*shape, length), jnp.int32)
    return _BeamState(
      step=jnp.int32(0),
      # Only one beam is live at first: the others would be copies of it.
      live_scores=never.at[:, 0].set(0.0),
      live_tokens=nothing,
      finished_scores=never,
      finished_tokens=nothing,
      is_finished=jnp.zeros(shape, bool),
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
    scores, parents, tokens = _best_continuations(
      logits, state.live_scores, 2 * self.num_beams
    )
    candidates = _choose(state.live_tokens, parents)
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
      live_tokens=_choose(candidates, live),
      finished_scores=finished_scores,
      finished_tokens=_choose(
        jnp.concatenate([state.finished_tokens, candidates], axis=1),
        finished,
      ),
      is_finished=_choose(
        jnp.concatenate([state.is_finished, ends], axis=1), finished
      ),
      cache=_choose_rows(cache, _choose(parents, live), start.batch_axis),
    )


def _best_continuations(
  logits: Array, live_scores: Array, count: int
) -> tuple[Array, Array, Array]:
  """Returns the best tokens to add to any beam.

  Args:
    logits: `[batch · beams, vocab]`.
    live_scores: log-probabilities of the hypotheses so far, `[batch, beams]`.
    count: how many continuations of each example.

  Returns:
    Log-probabilities, beams and tokens, each `[batch, count]`, best first.
  """
  # The best of an example are among the best of its beams: the whole
  # vocabulary is read once and nothing of its size is written.
  per_beam = min(count, logits.shape[-1])
  top, tokens = lax.top_k(logits, per_beam)
  log_probabilities = top - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
  batch, beams = live_scores.shape
  scores = log_probabilities.reshape(batch, beams, -1) + live_scores[..., None]
  scores, chosen = lax.top_k(scores.reshape(batch, -1), count)
  tokens = _choose(tokens.reshape(batch, -1), chosen)
  return scores, chosen // per_beam, tokens


def _choose(x: Array, indices: Array) -> Array:
  """Returns `[batch, chosen, …]` of x `[batch, n, …]`."""
  return jax.vmap(lambda row, index: row[index])(x, indices)


def _choose_rows(cache: PyTree, parents: Array, batch_axis: int) -> PyTree:
  """Gives every row of the cache the one of its parent, `[batch, beams]`."""

  def choose(x: Array) -> Array:
    if x.ndim == 0:  # The number of steps, shared by all rows.
      return x
    shape = x.shape
    x = x.reshape(*shape[:batch_axis], *parents.shape, *shape[batch_axis + 1 :])
    chosen = jax.vmap(
      lambda rows, index: jnp.take(rows, index, axis=batch_axis),
      in_axes=(batch_axis, 0),
      out_axes=batch_axis,
    )(x, parents)
    return chosen.reshape(shape)

  return jax.tree.map(choose, cache)
