"""Decoding: a prompt is read in one pass, then token by token with a cache.

The keys and values of a prompt are computed once and shared by all its
continuations: the cache that a beam search rearranges has those of the
continuations only.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dst_t5x.models import api
from dst_t5x.models.decoder_only import features
from dst_t5x.models.decoder_only.config import DecoderConfig

Array = jax.Array
PyTree = Any


class _Prompts(NamedTuple):
  """Where the tokens of prompts are; padding may be anywhere.

  Attributes:
    tokens: int32 `[batch, length]`, 0 for padding.
    positions: int32 `[batch, length]`, of the tokens among themselves.
    is_token: bool `[batch, length]`.
    is_last: bool `[batch, length]`, the last token. The first step reads it,
      and predicts what follows it.
  """

  tokens: Array
  positions: Array
  is_token: Array
  is_last: Array

  @classmethod
  def of(cls, prompts: Array) -> '_Prompts':
    """Returns those of int32 `[batch, length]`."""
    is_token = prompts != features.PADDING
    positions = jnp.maximum(jnp.cumsum(is_token, axis=1) - 1, 0)
    last = jnp.max(positions, axis=1, keepdims=True)
    is_last = is_token & (positions == last)
    return cls(jnp.maximum(prompts, 0), positions, is_token, is_last)

  def keys(self, max_decode_length: int) -> tuple[Array, Array, Array]:
    """Returns what steps know of their keys: the prompt's, then the cache's.

    Returns:
      The position of the last token, int32 `[batch, 1]`; positions of all keys,
      int32 `[batch, keys]`; which of them are there, bool `[batch, keys]`.
    """
    last = jnp.sum(self.is_token, axis=1, keepdims=True) - 1
    later = last + jnp.arange(max_decode_length)
    positions = jnp.concatenate([self.positions, later], axis=1)
    is_there = self.is_token & ~self.is_last
    is_there = jnp.concatenate([is_there, jnp.ones_like(later, bool)], axis=1)
    return last, positions, is_there


class _Steps(NamedTuple):
  """What all steps have in common.

  Attributes:
    apply: the network's.
    variables: the parameters, and `memory` of the prompts.
    last: see `_Prompts.keys`, of all rows; so are the others.
    key_positions: int32 `[rows, keys]`.
    is_there: bool `[rows, keys]`.
  """

  apply: Callable[..., Any]
  variables: PyTree
  last: Array
  key_positions: Array
  is_there: Array

  def step(self, tokens: Array, cache: PyTree) -> tuple[Array, PyTree]:
    """Reads a token of each row; see `api.DecodingStart`."""
    number = cache['step']
    logits, updated = self.apply(
      {**self.variables, 'cache': cache['layers']},
      tokens[:, None],
      self.last + number,
      self.key_positions,
      self.is_there,
      number,
      mutable=['cache'],
      method='decode',
    )
    return logits[:, 0], {'layers': updated['cache'], 'step': number + 1}


def start(
  config: DecoderConfig,
  apply: Callable[..., Any],
  params: PyTree,
  prompts: Array,
  beams: int,
  max_decode_length: int,
) -> api.DecodingStart:
  """Reads prompts; see `api.Network.start_decoding`.

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
  read = _Prompts.of(prompts)
  _, left = apply(
    {'params': params},
    read.tokens,
    read.positions,
    read.positions,
    read.is_token,
    mutable=['memory'],
    method='decode',
  )
  first = jnp.sum(jnp.where(read.is_last, read.tokens, 0), axis=1)
  first, *keys = (
    jnp.repeat(x, beams, axis=0) for x in (first, *read.keys(max_decode_length))
  )
  following = _Steps(apply, {'params': params, **left}, *keys)
  layers = _blank(left['memory'], beams, max_decode_length)
  cache = {'layers': layers, 'step': jnp.int32(0)}
  return api.DecodingStart(
    following.step, cache, int(config.scan_layers), first
  )


def _blank(memory: PyTree, beams: int, max_decode_length: int) -> PyTree:
  """Returns an empty cache for all continuations.

  Args:
    memory: keys and values of the prompts, each `[…, batch, heads, length,
      head_dim]`.
    beams: continuations of each prompt.
    max_decode_length: tokens of a continuation at most.
  """

  def blank(x: Array) -> Array:
    *layers, batch, heads, _, head_dim = x.shape
    shape = (*layers, beams * batch, heads, max_decode_length, head_dim)
    return jnp.zeros(shape, x.dtype)

  return jax.tree.map(blank, memory)
