"""Decoding: a prompt is read in one pass, then token by token with a cache.

The keys and values of a prompt are computed once and shared by all its
continuations: the cache that a beam search rearranges has those of the
continuations only.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dst_t5x.models import api
from dst_t5x.models.decoder_only import features
from dst_t5x.models.decoder_only.config import DecoderConfig

Array = jax.Array
PyTree = Any


def start(
  config: DecoderConfig,
  apply: Callable[..., Any],
  params: PyTree,
  prompts: Array,
  beams: int,
  max_decode_length: int,
) -> api.DecodingStart:
  """Reads prompts; see `api.Network.start_decoding`.

  Padding may be anywhere in a prompt.

  Args:
    config: of the network.
    apply: the network's.
    params: its parameters.
    prompts: int32 `[batch, length]`, filled up with `features.PADDING`.
    beams: continuations of each prompt.
    max_decode_length: tokens of a continuation at most.

  Raises:
    UserError: a prompt and its continuation are longer than the context.
  """
  features.check_length(
    config, prompts.shape[1] + max_decode_length, 'to decode'
  )
  is_token = prompts != features.PADDING
  positions = jnp.maximum(jnp.cumsum(is_token, axis=1) - 1, 0)
  # The last token is read by the first step, which predicts what follows it.
  is_last = is_token & (positions == jnp.max(positions, axis=1, keepdims=True))
  is_last &= jnp.any(is_token, axis=1, keepdims=True)
  first = jnp.sum(jnp.where(is_last, prompts, 0), axis=1)
  variables = {'params': params}
  _, read = apply(
    variables,
    jnp.maximum(prompts, 0),
    positions,
    positions,
    is_token,
    mutable=['memory'],
    method='decode',
  )
  batch_axis = int(config.scan_layers)

  def blank(x: Array) -> Array:
    """Returns an empty cache for x `[…, batch, heads, length, head_dim]`."""
    *layers, batch, heads, _, head_dim = x.shape
    shape = (*layers, beams * batch, heads, max_decode_length, head_dim)
    return jnp.zeros(shape, x.dtype)

  last = jnp.sum(is_token, axis=1, keepdims=True) - 1
  later = last + jnp.arange(max_decode_length)
  key_positions = jnp.concatenate([positions, later], axis=1)
  is_there = jnp.concatenate(
    [is_token & ~is_last, jnp.ones_like(later, bool)], axis=1
  )
  last, key_positions, is_there, first = (
    jnp.repeat(x, beams, axis=0) for x in (last, key_positions, is_there, first)
  )

  def step(tokens: Array, cache: PyTree) -> tuple[Array, PyTree]:
    number = cache['step']
    logits, updated = apply(
      {**variables, 'memory': read['memory'], 'cache': cache['layers']},
      tokens[:, None],
      last + number,
      key_positions,
      is_there,
      number,
      mutable=['cache'],
      method='decode',
    )
    return logits[:, 0], {'layers': updated['cache'], 'step': number + 1}

  cache = {'layers': jax.tree.map(blank, read['memory']), 'step': jnp.int32(0)}
  return api.DecodingStart(step, cache, batch_axis, first)
