"""Gives each example of a batch its own copy of T5's small tensors.

The default suits the scales of layer norms. Relative position biases need their
own interceptor, because their inputs are positions and not rows.
"""

from collections.abc import Callable, Mapping
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from dst_t5x.models import own_tensors
from dst_t5x.models.t5 import attention

Array = jax.Array


def interceptor(tensors: own_tensors.Tensors) -> own_tensors.Interceptor:
  """See `api.Network.own_tensors`."""
  by_rows = own_tensors.interceptor(tensors)

  def intercept(
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    context: nn.module.InterceptorContext,
  ) -> Any:
    module = context.module
    if context.method_name == '__call__':
      if type(module) is attention.RelativePositionBias:
        return _biases(module, own_tensors.of(module, tensors), *args)
      if type(module) is attention.SelfAttention:
        return _self_attention(call, *args, **kwargs)
    return by_rows(call, args, kwargs, context)

  return intercept


def _biases(
  module: nn.Module, own: Mapping[str, Array], buckets: Array
) -> Array:
  """Returns each example's biases, `[batch, heads, query, key]`."""
  return own_tensors.apply(module, own, buckets=buckets)[:, 0]


def _self_attention(
  call: Callable[..., Array],
  inputs: Array,
  mask: Array | None,
  bias: Array,
  *others: Any,
  **options: Any,
) -> Array:
  """Calls self-attention with an example's bias repeated for its beams.

  The beams of an example are adjacent rows.
  """
  beams = inputs.shape[0] // bias.shape[0]
  biases = jnp.repeat(bias, beams, axis=0)
  return call(inputs, mask, biases, *others, **options)
