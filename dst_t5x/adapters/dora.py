"""DoRA (Liu et al., 2024): LoRA for directions, a vector for magnitudes."""

from collections.abc import Callable, Collection, Mapping
import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from dst_t5x.adapters import api as adapters
from dst_t5x.adapters import lora
from dst_t5x.adapters import peft
from dst_t5x.core import stable_ids

_NAME = 'lora_magnitude'


@stable_ids.called('dora')
@dataclasses.dataclass(frozen=True)
class DoRA(lora.LoRA):
  """y = x(W + scale · AB) · m / ‖W + scale · AB‖ (Section 4.1, Equation 5).

  ‖·‖ is the norm of each output's weights, [features]. m is `lora_magnitude`
  [features] and starts at ‖W‖, so that the network starts as the seed, but for
  rounding. The norm is a constant in the gradient (Section 4.3). A bias is not
  rescaled. As in Hugging Face PEFT, dropout is that of the input of all that is
  added to xW. Each step forms the product AB, to take its norm.

  Attributes: see `lora.LoRA`.
  """

  added: ClassVar[str] = r'.*/lora_([ab]|magnitude)'
  peft_options: ClassVar[Mapping[str, Any]] = {'use_dora': True}

  def adapted(
    self, linear: adapters.Linear, x: jax.Array, y: jax.Array
  ) -> jax.Array:
    """See `lora.LoRA`."""
    a, b = self.factors(linear, x.shape[-1])
    kernel = linear.kernel

    def init(*_: Any) -> jax.Array:
      return jnp.linalg.norm(kernel, axis=0)

    magnitude = linear.parameter(
      _NAME, init, (linear.features,), (linear.axes[1],)
    )
    norm = jnp.linalg.norm(kernel + self.scale * jnp.dot(a, b), axis=0)
    norm = jax.lax.stop_gradient(jnp.where(norm > 0, norm, 1))
    factor = magnitude / norm
    if self.dropout_rate and not linear.deterministic:
      x = lora.dropped(linear, x, self.dropout_rate)
      own = jnp.dot(x.astype(linear.dtype), kernel.astype(linear.dtype))
    else:
      own = y if linear.bias is None else y - linear.bias.astype(y.dtype)
    # Subtracted in float32: the factors are near 1.
    return (
      y
      + (factor - 1).astype(linear.dtype) * own
      + factor.astype(linear.dtype) * self.product(linear, x, a, b)
    )

  def initialize(
    self,
    added: Mapping[str, np.ndarray],
    seed: Mapping[str, np.ndarray],
    random: np.random.Generator,
    encode: Callable[[str], list[int]],
    embedding_scale: float = 1.0,
  ) -> dict[str, np.ndarray]:
    """Returns the initial parameters, the magnitudes from the seed."""
    del random, encode, embedding_scale
    first = dict(added)
    for module in adapters.modules_of(added, self.added):
      first[f'{module}/{_NAME}'] = _norm(seed[f'{module}/{adapters.KERNEL}'])
    return first

  def merged_kernel(
    self, module: str, params: Mapping[str, np.ndarray]
  ) -> np.ndarray:
    """See `lora.LoRA`."""
    kernel = super().merged_kernel(module, params)
    norm = _norm(kernel)
    factor = params[f'{module}/{_NAME}'] / np.where(norm > 0, norm, 1)
    return kernel * factor[..., None, :]

  def peft_tensors(
    self, modules: Collection[str], base: peft.Base
  ) -> list[peft.Tensor]:
    """See `adapters.Adapter`."""
    shapes = {module: (base.shapes[module][1],) for module in sorted(modules)}
    return super().peft_tensors(modules, base) + [
      peft.Tensor(
        f'{module}/{_NAME}',
        'lora_magnitude_vector',
        shape,
        shape,
        module=module,
      )
      for module, shape in shapes.items()
    ]


def _norm(kernel: np.ndarray) -> np.ndarray:
  """Returns the norm of each output's weights, [..., features], float32."""
  norm: np.ndarray = np.linalg.norm(np.asarray(kernel, np.float64), axis=-2)
  return norm.astype(np.float32)
