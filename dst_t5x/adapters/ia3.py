"""(IA)³ (Liu et al., 2022): rescales keys, values and hidden units."""

from collections.abc import Mapping
import dataclasses
import re
from typing import ClassVar

from flax import linen as nn
import jax
import numpy as np

from dst_t5x.adapters import api as adapters

# The linear maps whose outputs, and those whose inputs, are rescaled.
OUTPUTS = r'.*attention/(key|value)'
INPUTS = r'.*mlp/wo'


@dataclasses.dataclass(frozen=True)
class IA3(adapters.Adapter):
  """Learned factors `ia3`, which start at one (Section 3.3).

  The factors of the keys and values of all attention are [features]. Those of
  the inputs of the feed-forward block's last map are [n].
  """

  added: ClassVar[str] = r'.*/ia3'

  def linear(self, linear: adapters.Linear, x: jax.Array) -> jax.Array:
    """Rescales the output or the input."""
    if re.fullmatch(OUTPUTS, linear.path):
      y = linear.apply(x)
      return y * _factors(linear, y, linear.axes[1])
    if re.fullmatch(INPUTS, linear.path):
      return linear.apply(x * _factors(linear, x, linear.axes[0]))
    return linear.apply(x)

  def merge(self, params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Multiplies the kernels' columns or rows by the factors."""
    merged = self.without_added(params)
    for path in params:
      if re.fullmatch(self.added, path):
        module = path.removesuffix('/ia3')
        is_input = re.fullmatch(INPUTS, module)
        factors = np.expand_dims(params[path], -1 if is_input else -2)
        kernel = merged[f'{module}/kernel']
        merged[f'{module}/kernel'] = (kernel * factors).astype(kernel.dtype)
    return merged


def _factors(
  linear: adapters.Linear, x: jax.Array, axis: str | None
) -> jax.Array:
  """Returns the factors of the last axis of x."""
  factors = linear.parameter(
    'ia3', nn.initializers.ones, (x.shape[-1],), (axis,)
  )
  return factors.astype(linear.dtype)
