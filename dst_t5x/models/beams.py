"""Arrays of hypotheses, for `decoding.BeamSearch`."""

from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

Array = jax.Array
PyTree = Any


def best_continuations(
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
  tokens = choose(tokens.reshape(batch, -1), chosen)
  return scores, chosen // per_beam, tokens


def choose(x: Array, indices: Array) -> Array:
  """Returns `[batch, chosen, …]` of x `[batch, n, …]`."""
  return jax.vmap(lambda row, index: row[index])(x, indices)


def choose_rows(cache: PyTree, parents: Array, batch_axis: int) -> PyTree:
  """Returns a cache whose rows are those of their parents, `[batch, beams]`."""

  def of_leaf(x: Array) -> Array:
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

  return jax.tree.map(of_leaf, cache)
