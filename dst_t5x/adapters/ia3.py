"""(IA)³ (Liu et al., 2022): rescales keys, values and hidden units."""

from collections.abc import Collection, Mapping
import dataclasses
import re
from typing import Any, ClassVar

from flax import linen as nn
import jax
import numpy as np

from dst_t5x.adapters import api as adapters
from dst_t5x.adapters import peft
from dst_t5x.core import json_object
from dst_t5x.core.errors import UserError

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
  peft_type: ClassVar[str] = 'IA3'

  def linear(self, linear: adapters.Linear, x: jax.Array) -> jax.Array:
    """Rescales the output or the input."""
    if re.fullmatch(OUTPUTS, linear.path):
      y = linear.apply(x)
      return y * _factors(linear, y, linear.axes[1])
    if re.fullmatch(INPUTS, linear.path):
      return linear.apply(x * _factors(linear, x, linear.axes[0]))
    return linear.apply(x)

  def merge(self, params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Multiplies the kernels' rows, or their columns and the biases."""
    merged = self.without_added(params)
    for path in params:
      if re.fullmatch(self.added, path):
        module = path.removesuffix('/ia3')
        is_input = re.fullmatch(INPUTS, module)
        factors = np.expand_dims(params[path], -1 if is_input else -2)
        rescaled = {f'{module}/{adapters.KERNEL}': factors}
        bias = f'{module}/{adapters.BIAS}'
        if bias in merged and not is_input:
          rescaled[bias] = params[path]
        for name, by in rescaled.items():
          old = merged[name]
          merged[name] = (old * by).astype(old.dtype)
    return merged

  def peft_settings(
    self, modules: Collection[str], base: peft.Base
  ) -> dict[str, Any]:
    """See `adapters.Adapter`."""
    inputs = [module for module in modules if re.fullmatch(INPUTS, module)]
    return {'feedforward_modules': peft.last_parts(inputs, base)}

  @classmethod
  def peft_read(
    cls,
    stated: json_object.JsonObject,
    modules: Collection[str],
    base: peft.Base,
  ) -> 'IA3':
    """See `adapters.Adapter`."""
    del stated
    ours = {m for m in base.names if re.fullmatch(f'{OUTPUTS}|{INPUTS}', m)}
    if set(modules) != ours:
      *others, last = peft.last_parts(ours, base)
      raise UserError(
        f'here, (IA)³ is of all {", ".join(others)} and {last}, and only these'
      )
    return cls()

  def peft_tensors(
    self, modules: Collection[str], base: peft.Base
  ) -> list[peft.Tensor]:
    """See `adapters.Adapter`."""
    tensors = []
    for module in sorted(modules):
      n, features = base.shapes[module]
      is_input = re.fullmatch(INPUTS, module)
      shape = (1, n) if is_input else (features, 1)
      tensors.append(
        peft.Tensor(
          f'{module}/ia3', 'ia3_l', shape, (max(shape),), module=module
        )
      )
    return tensors


def _factors(
  linear: adapters.Linear, x: jax.Array, axis: str | None
) -> jax.Array:
  """Returns the factors of the last axis of x."""
  factors = linear.parameter(
    'ia3', nn.initializers.ones, (x.shape[-1],), (axis,)
  )
  return factors.astype(linear.dtype)
